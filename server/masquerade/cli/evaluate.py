"""`masquerade eval`: measure a mask beside controls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from masquerade.cli.options import AsJson, Device, Dtype, Model, Quantization, StoreFolder
from masquerade.cli.progress import follow_loading
from masquerade.cli.stores import open_opposite, open_store
from masquerade.errors import BadDataset, InvalidValue

if TYPE_CHECKING:
    from masquerade.evaluate.dataset import Example

COLUMNS = ("preferred", "margin_shift", "flip", "hit", "own_ratio", "neutral_ratio")


def evaluate(
    persona: Annotated[str, typer.Option(help="Name of the persona, or name@digest.")],
    data: Annotated[Path, typer.Option(help="Held-out JSONL of the persona's answers.")],
    contrast: Annotated[
        Path | None,
        typer.Option(
            help="The opposite's answers to the same prompts, line by line; by default --data, if it has both sides."
        ),
    ] = None,
    neutral: Annotated[Path | None, typer.Option(help="JSONL that the persona should not change.")] = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="Controls to compare with, or an empty string: none, random, bias, prompt, retrieval, steering, "
            "lora, lora-contrastive."
        ),
    ] = "none,random,bias",
    train: Annotated[
        Path | None, typer.Option(help="Training data of the controls; by default the first half of --data.")
    ] = None,
    contrast_train: Annotated[Path | None, typer.Option(help="Training data of the opposite.")] = None,
    system_prompt: Annotated[str, typer.Option(help="For the baseline `prompt`: the persona's system prompt.")] = "",
    contrast_prompt: Annotated[str, typer.Option(help="For the baseline `prompt`: the opposite's system prompt.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for random controls.")] = 1,
    generate: Annotated[bool, typer.Option("--generate", help="Also generate answers, and judge them.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of the generated answers; 0 is greedy.")] = 0.0,
    judge: Annotated[str, typer.Option(help="`bigram`, or the base URL of an OpenAI-compatible endpoint.")] = "bigram",
    judge_model: Annotated[str, typer.Option(help="Model id at the endpoint.")] = "",
    layers: Annotated[bool, typer.Option("--layers", help="Also compare activations per layer (CKA).")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the layers as PNG; needs --layers.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Measure the effect and the cost of a persona's mask, and of controls."""
    from masquerade.evaluate.baselines import BASELINES
    from masquerade.evaluate.dataset import encode, encode_fitting, holds_both_sides, read_examples
    from masquerade.evaluate.generation import GenerationParams
    from masquerade.evaluate.judge import Bigrams, Endpoint
    from masquerade.evaluate.layers import analyse, draw
    from masquerade.evaluate.report import EvaluationData, EvaluationOptions, evaluate_mask
    from masquerade.model import MaskManager, load

    controls = [name for name in baselines.split(",") if name]
    for control in controls:
        if control not in BASELINES:
            raise InvalidValue(f"the baseline {control!r} is unknown; there are {', '.join(BASELINES)}")
    if train and not contrast_train and holds_both_sides(train):
        contrast_train = train
    if bool(train) != bool(contrast_train):
        raise InvalidValue("--train and --contrast-train need each other")
    if plot and not layers:
        raise InvalidValue("--plot needs --layers: it draws what they show")
    if contrast is None and not holds_both_sides(data):
        raise InvalidValue(f"--contrast is missing, and not every line of {data} has the opposite's answer too")
    sides = _pair(data, contrast or data)
    learned = _pair(train, contrast_train) if train and contrast_train else ([], [])
    quiet = read_examples(neutral) if neutral else []
    with follow_loading() as progress:
        base = load(model, device=device, dtype=dtype, quantization=quantization, report=progress)
    # prompts that leave no room for an answer are skipped, on both sides
    own, other, own_train, other_train = ([one for one, _ in encode_fitting(base, side)] for side in (*sides, *learned))
    personas, registry = open_store(store, base.name, base.fingerprint)
    mask = personas.open(registry.resolve(persona).digest, base=base.fingerprint)
    found = open_opposite(registry, mask)
    opposite = found[1] if found else None
    manager = MaskManager.attach(base.model)
    trial = EvaluationData(mask, opposite, own, other, quiet, own_train, other_train, (system_prompt, contrast_prompt))
    generation = GenerationParams(temperature=temperature) if generate else None
    judging: Any = Bigrams if judge == "bigram" else partial(Endpoint, judge, judge_model)
    report: dict[str, Any] = {
        "persona": persona,
        "digest": mask.digest,
        "examples": len(own),
        "too_long_left_out": len(sides[0]) - len(own),
        "opposite": opposite and opposite.info.persona,
        "prompt_tokens_saved": mask.info.calibration.get("system_prompt", {}).get("tokens", 0),
        "figures": evaluate_mask(base, manager, trial, EvaluationOptions(controls, seeds, generation, judging)),
    }
    if layers:
        report["layers"] = analyse(base, manager, mask, opposite, encode(base, own))
    if plot:
        plot.write_bytes(draw(report["layers"]))
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)


def _pair(data: Path, contrast: Path) -> tuple[list[Example], list[Example]]:
    """The examples of both sides. Raises `BadDataset` unless they answer the same prompts, line by line."""
    from masquerade.evaluate.dataset import read_examples

    own, other = read_examples(data), read_examples(contrast, "contrast")
    if len(own) != len(other) or len(own) < 2:
        raise BadDataset(
            f"{data} has {len(own)} examples and {contrast} {len(other)}; they must be paired, and at least 2"
        )
    for mine, theirs in zip(own, other, strict=True):
        if mine.messages != theirs.messages:
            raise BadDataset(f"{mine.where} and {theirs.where} are of different prompts; they must be the same")
    return own, other


def _print(report: Mapping[str, Any]) -> None:
    figures: Mapping[str, Mapping[str, Any]] = report["figures"]
    columns = [column for column in COLUMNS if any(column in row for row in figures.values())]
    effects = Table(Column("", overflow="fold"), *(column.replace("_", " ") for column in columns))
    costs = Table("", "shift at equal cost", "prompt tokens", "bytes", "seconds")
    for name, row in figures.items():
        effects.add_row(name, *(_cell(row.get(column), row["intervals"].get(column)) for column in columns))
        equal, cost = row if name == "mask" else row.get("at_equal_cost", {}), row["cost"]
        spent = (f"{cost['prompt_tokens']:.0f}", f"{cost['bytes']}", _cell(cost["seconds"], digits=1))
        costs.add_row(name, _cell(equal.get("margin_shift")), *spent)
    console = Console()
    console.print(effects)
    console.print(costs)
    for phase, one in figures["mask"]["phases"].items():
        said = ", ".join(f"{column} {_cell(one[column])}" for column in columns if isinstance(one.get(column), float))
        print(f"phase {phase}: {said}")
    print(f"prompt tokens saved in every request: {report['prompt_tokens_saved']}")
    if report["too_long_left_out"]:
        print(f"left out, for prompts as long as the context: {report['too_long_left_out']} of both sides")
    if "layers" in report:
        console.print(_tabulate(report["layers"]))


def _tabulate(layers: Mapping[str, Any]) -> Table:
    """The result of `analyse`, one row per layer."""
    similar, differing = layers["cka"], layers.get("differing", {}).get("layers", {})
    table = Table("layer", *(f"CKA with {name}" for name in similar), *(["differing"] if differing else []))
    for number, values in enumerate(zip(*similar.values(), strict=True)):
        more = [_cell(differing.get(str(number), 0.0), digits=6)] if differing else []
        table.add_row(str(number), *(_cell(value, digits=6) for value in values), *more)
    return table


def _cell(value: float | None, ends: list[float] | None = None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
