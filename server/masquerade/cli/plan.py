"""`masquerade plan`: what a model takes and what fits beside it, without loading it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from masquerade.cli import heap
from masquerade.cli.options import AsJson, Device, Dtype, Model, Quantization, SplitLayers
from masquerade.errors import InvalidValue, UnusableModel
from masquerade.plan.memory import format_bytes, parse_bytes, read_memory
from masquerade.sources import find_model

if TYPE_CHECKING:
    from masquerade.engine import EngineConfig
    from masquerade.plan.build import BuildCost
    from masquerade.plan.fit import Fit
    from masquerade.plan.outline import Outline

_log = logging.getLogger("masquerade")
CONTEXT = 8192  # tokens of a request, unless the model's context is shorter
Report = dict[str, Any]


def plan(
    model: Model = "demo",
    memory: Annotated[
        str | None, typer.Option(help="Memory to fit into, such as 24GiB; by default that of this machine or its GPU.")
    ] = None,
    personas: Annotated[
        int | None, typer.Option(min=1, help="Personas on the device at once; by default one a running request.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help=f"Tokens of a request; by default {CONTEXT}, or the model's context if that is less."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Maximum number of requests in a batch, as of serve.")] = 32,
    device: Device = "auto",
    split_layers: SplitLayers = 1,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model takes, what fits beside it, and what a build takes, without loading the model."""
    with heap.importing():
        from masquerade.plan.build import estimate_build
        from masquerade.plan.fit import Workload, find_remedies, fit
        from masquerade.pruning import Recipe

    outline = _read(model, device, dtype)
    if split_layers > 1 and outline.device == "cpu":
        raise InvalidValue("--split-layers divides the layers among GPUs; add --device cuda", param="split_layers")
    if context is not None and context > outline.context:
        raise InvalidValue(
            f"--context is {context}; {outline.name} has a context of {outline.context}", param="context"
        )
    if quantization and outline.stored:
        raise UnusableModel(f"{outline.name} is quantised in its files ({outline.stored}); leave --quantization out")
    form = quantization or outline.stored
    have, source = _find_memory(memory, outline.device, split_layers)
    workload = Workload(
        personas or max_running,
        context or min(CONTEXT, outline.context),
        max_running,
        Recipe().search_settings.rho,
    )
    try:
        found = fit(outline, workload, have, form)
    except ValueError as error:
        raise UnusableModel(f"--quantization {quantization}: {error}") from error
    remedies = find_remedies(outline, found, form) if found.missing else []
    report = {
        "model": _describe_model(outline, form),
        "weights": _describe_weights(outline, form),
        "kv": _describe_cache(outline, found),
        "personas": _describe_personas(outline, found, form),
        "memory": {"bytes": have, "source": source},
        "fit": _describe_fit(found) | {"remedies": [asdict(one) for one in remedies]},
        "build": _describe_build(estimate_build(outline, form)),
    }
    print(json.dumps(report) if as_json else "\n".join(_write(report)))
    if found.missing:
        raise UnusableModel(
            f"{outline.name} does not fit into {format_bytes(have)}: {format_bytes(found.needed)} are needed, "
            f"{format_bytes(found.missing)} are missing"
        )


def announce(
    model: str,
    device: str,
    split_layers: int,
    dtype: str,
    config: EngineConfig,
    mask_bytes: int,
    quantization: str | None,
) -> None:
    """Log what a server will take, and warn if that is more than there is.

    Raises `UnusableModel` only where the weights cannot fit. Says nothing about a model that has no readable header:
    loading it says why.
    """
    from masquerade.plan.reservation import check_loadable, reserve
    from masquerade.pruning import Recipe

    try:
        outline = _read(model, device, dtype)
        quantization = quantization or outline.stored
        found = reserve(outline, config, mask_bytes, Recipe().search_settings.rho, quantization)
    except (UnusableModel, ValueError) as error:
        _log.debug("no plan: %s", error)
        return
    _log.info("%s on %s %s", outline.name, outline.device, found.describe())
    memory = read_memory(outline.device, split_layers)
    if memory is None:
        return
    check_loadable(outline, memory, quantization)
    if (missing := found.nbytes - min(memory.usable, memory.available)) > 0:
        _log.warning(
            "%s of that are not available now; lower --cache-bytes or --mask-bytes, or see `masquerade plan`",
            format_bytes(missing),
        )


def _read(model: str, device: str, dtype: str) -> Outline:
    """The outline, on the device that `model.load` would choose."""
    import torch

    from masquerade.plan.outline import read_outline

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return read_outline(find_model(model, download=False), device, dtype)


def _find_memory(given: str | None, device: str, gpus: int) -> tuple[int, str]:
    """Bytes to fit into, and where the number is from."""
    if given is not None:
        return parse_bytes(given, "--memory"), "--memory"
    if (found := read_memory(device, gpus)) is None:
        raise InvalidValue(f"the memory of a {device} device cannot be read here; give --memory", param="memory")
    return found.usable, "this machine" if device == "cpu" else "the GPU" if gpus == 1 else f"{gpus} GPUs together"


def _describe_model(outline: Outline, quantization: str | None) -> Report:
    from masquerade.plan.fit import name_dtype

    config = outline.config
    return {
        "name": outline.name,
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": outline.context,
        "parameters": outline.parameters,
        "linears": len(outline.linears),
        "maskable": outline.maskable,
        "device": outline.device,
        "dtype": name_dtype(outline.dtype),
        "quantization": quantization,
    }


def _describe_weights(outline: Outline, quantization: str | None) -> Report:
    """Bytes by dtype and quantisation; None where bitsandbytes cannot quantise the model."""
    import torch

    from masquerade.model.quantized import A8, QUANTIZATIONS
    from masquerade.plan.fit import name_dtype
    from masquerade.plan.footprint import measure_served, measure_weights

    found: Report = {"files": dict(outline.files)}
    for name in dict.fromkeys(("float32", "bfloat16", name_dtype(outline.dtype))) if not outline.stored else ():
        found[name] = measure_weights(outline, getattr(torch, name))
    for name in [outline.stored] if outline.stored else [*QUANTIZATIONS, *([A8] if outline.saved else [])]:
        try:
            found[name] = measure_weights(outline, outline.dtype, name)
        except ValueError:
            found[name] = None
    kept = outline.keeps and not quantization
    return found | {"served": measure_served(outline, quantization), "kept": kept}


def _describe_cache(outline: Outline, found: Fit) -> Report:
    from masquerade.engine.prefix import BLOCK_SIZE
    from masquerade.plan.footprint import PADDING, find_window, measure_token

    window, slots = find_window(outline.config), found.workload.requests
    return {
        "bytes_a_token": measure_token(outline),
        "block": BLOCK_SIZE,
        "context": found.workload.context,
        "request_bytes": found.request * found.block,
        "requests": slots,
        "pool_bytes": (slots * found.request + PADDING) * found.block,
        "window": {"tokens": window[0], "layers": window[1]} if window else None,
    }


def _describe_personas(outline: Outline, found: Fit, quantization: str | None) -> list[Report]:
    """A persona by rho, and how many fit beside 1 and beside all requests."""
    from masquerade.plan.footprint import RHOS, measure_persona

    rows = []
    for rho in RHOS:
        one = measure_persona(outline, rho, quantization)
        fitting = {count: found.count_personas(count, one.nbytes) for count in _steps(found.workload.requests)}
        rows.append(
            {
                "rho": rho,
                "pruned": one.pruned,
                "list_bytes": one.listed,
                "bitmap_bytes": one.bitmaps,
                "bytes": one.nbytes,
                "forms": one.forms,
                "fit_beside_requests": fitting,
            }
        )
    return rows


def _steps(most: int) -> list[int]:
    """1, 4, 16, ... and the most."""
    return [*(count for count in (4**power for power in range(10)) if count < most), most]


def _describe_fit(found: Fit) -> Report:
    return {
        "fits": not found.missing,
        "personas": found.workload.personas,
        "rho": found.workload.rho,
        "lines": [asdict(line) for line in found.lines],
        "needed": found.needed,
        "missing": found.missing,
        "requests": found.requests,
        "cache_bytes": found.cache_bytes,
        "mask_bytes": found.mask_bytes,
    }


def _describe_build(cost: BuildCost) -> Report:
    from masquerade.plan.build import BASIS, PEAK

    return {
        "lines": [asdict(line) for line in cost.lines],
        "memory": cost.memory,
        "memory_basis": PEAK,
        "operations": cost.operations,
        "cpu_seconds": None if cost.cpu_seconds is None else round(cost.cpu_seconds),
        "basis": None if cost.cpu_seconds is None else BASIS,
    }


def _write(report: Report) -> Iterator[str]:
    """The report as lines for people."""
    model = report["model"]
    yield (
        f"{model['name']} on {model['device']}: {model['architecture']}, {model['layers']} layers of "
        f"{model['hidden']}, vocabulary {model['vocabulary']}, context {model['context']}"
    )
    yield (
        f"parameters: {model['parameters']:,}, of which {model['maskable']:,} in {model['linears']} Linears that a "
        "persona may mask"
    )
    yield from _write_weights(report["weights"], model)
    yield from _write_cache(report["kv"], model["dtype"], model["layers"])
    yield from _write_personas(report["personas"])
    yield from _write_fit(report)
    yield from _write_build(report["build"])


def _write_weights(weights: Report, model: Report) -> Iterator[str]:
    from masquerade.model.quantized import QUANTIZATIONS

    served = "kept" if weights["kept"] else model["quantization"] or model["dtype"]
    yield "\nweights"
    kinds = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in weights["files"].items())
    total = format_bytes(sum(weights["files"].values()))
    yield f"  in the files: {f'{total} ({kinds})' if kinds else 'not there'}"
    for name, count in weights.items():
        if name in ("files", "served", "kept"):
            continue
        text = "not possible with rows of this length" if count is None else format_bytes(count)
        rest = f", embeddings and norms in {model['dtype']}" if name in QUANTIZATIONS and count is not None else ""
        yield f"  {name}: {text}{rest}{'; served' if name == served else ''}"
    if weights["kept"]:
        yield f"  in the file's blocks: {format_bytes(weights['served'])}; served"


def _write_cache(kv: Report, dtype: str, layers: int) -> Iterator[str]:
    yield f"\nKV cache in {dtype}"
    yield f"  a token: {format_bytes(kv['bytes_a_token'])}"
    yield f"  a request of {kv['context']} tokens: {format_bytes(kv['request_bytes'])}, in blocks of {kv['block']}"
    yield f"  {kv['requests']} such requests: {format_bytes(kv['pool_bytes'])}"
    if window := kv["window"]:
        yield (
            f"  a sliding window of {window['tokens']} tokens in {window['layers']} of {layers} layers saves nothing: "
            "the cache keeps every token of every layer"
        )


def _write_personas(rows: list[Report]) -> Iterator[str]:
    counts = list(rows[0]["fit_beside_requests"])
    yield "\na persona on the device, and how many fit beside the KV cache of so many requests"
    heads = ["rho", "pruned", "as lists", "as bitmaps", "as kept", *(f"{count} req." for count in counts)]
    yield "  " + " ".join(f"{head:>11}" for head in heads)
    for row in rows:
        sizes = (format_bytes(row[key]) for key in ("list_bytes", "bitmap_bytes", "bytes"))
        cells = [f"{row['rho']:g}", f"{row['pruned']:,}", *sizes, *map(str, row["fit_beside_requests"].values())]
        yield "  " + " ".join(f"{cell:>11}" for cell in cells)


def _write_fit(report: Report) -> Iterator[str]:
    model, fit, memory, kv = (report[key] for key in ("model", "fit", "memory", "kv"))
    yield f"\n{'fits' if fit['fits'] else 'does not fit'} into {format_bytes(memory['bytes'])} ({memory['source']})"
    for line in fit["lines"]:
        yield f"  {format_bytes(line['nbytes']):>11}  {line['what']}"
    yield f"  {format_bytes(fit['needed']):>11}  needed"
    if model["device"] == "cuda":
        yield "  not counted: CUDA's context, CUDA graphs and the activations of a step"
        weights = report["weights"]  # those that are quantised in their files are so in the host's memory
        yield f"  loading takes {format_bytes(weights.get(model['dtype'], weights['served']))} of the host's memory"
    if fit["fits"]:
        yield f"  {format_bytes(memory['bytes'] - fit['needed']):>11}  left for more requests or personas"
        yield f"  {fit['requests']} of {kv['requests']} requests of {kv['context']} tokens run at once"
        yield f"  serve with --cache-bytes {fit['cache_bytes']} --mask-bytes {fit['mask_bytes']}"
        return
    yield f"  {format_bytes(fit['missing']):>11}  missing"
    for remedy in fit["remedies"]:
        enough = ", which is enough" if remedy["saves"] >= fit["missing"] else ""
        yield f"  {remedy['option']} saves {format_bytes(remedy['saves'])}{enough}"


def _write_build(build: Report) -> Iterator[str]:
    yield "\na build of a persona and its opposite with the default score"
    for line in build["lines"]:
        yield f"  {format_bytes(line['nbytes']):>11}  {line['what']}"
    yield f"  {format_bytes(build['memory']):>11}  at least; the process, activations and logits come on top:"
    yield f"               {build['memory_basis']}"
    yield f"  the search takes at most {build['operations']:.1e} floating-point operations"
    if build["cpu_seconds"] is None:
        yield "  no time: no build was timed on a GPU"
    else:
        yield f"  about {_format_seconds(build['cpu_seconds'])} of CPU time: {build['basis']}"


def _format_seconds(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
