"""`masquerade eval`: measure a mask beside controls."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from masquerade.cli.options import AsJson, Device, Dtype, Model, Quantization, StoreFolder
from masquerade.cli.progress import follow_loading, follow_stages
from masquerade.cli.stores import open_opposite, open_store
from masquerade.errors import BadDataset, InvalidValue
from masquerade.sources import find_model

if TYPE_CHECKING:
    from masquerade.evaluate.dataset import Example

COLUMNS = ("preferred", "margin_shift", "margin_shift_median", "flip", "own_ratio", "neutral_ratio")
WIDTH = 120  # columns of tables that go to no terminal
TOKENS, QUICK_TOKENS = 48, 32  # most of a generated answer
SPOKEN = ("differing", "everyday_differing", "loops", "distinct_2", "distinct_3")  # of answers


def evaluate(
    persona: Annotated[str, typer.Option(help="Name of the persona, or name@digest.")],
    data: Annotated[Path, typer.Option(help="Held-out JSONL of the persona's answers.")],
    contrast: Annotated[
        Path | None,
        typer.Option(
            help="The opposite's answers to the same prompts, line by line; by default --data, if it has both sides."
        ),
    ] = None,
    neutral: Annotated[
        Path | None,
        typer.Option(
            help="JSONL that the persona should not change; by default the base's answers to everyday questions."
        ),
    ] = None,
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
    masks: Annotated[
        str,
        typer.Option(help="Other personas of the store to compare with at equal neutral cost, such as one-shot masks."),
    ] = "",
    gammas: Annotated[str, typer.Option(help="More gammas to measure the mask at, such as 0,0.25,0.5,0.75.")] = "",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Small samples, and answers without the controls'; bfloat16 where dtype is auto."),
    ] = False,
    generate: Annotated[bool, typer.Option(help="Generate answers, and compare and judge them.")] = True,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of the generated answers; 0 is greedy.")] = 0.0,
    judge: Annotated[str, typer.Option(help="`ngrams`, or the base URL of an OpenAI-compatible endpoint.")] = "ngrams",
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
    from masquerade.evaluate.judge import Endpoint, PersonaClassifier
    from masquerade.evaluate.layers import analyse, draw
    from masquerade.evaluate.report import QUICK, EvaluationData, EvaluationOptions, EvaluationSizes, evaluate_mask
    from masquerade.model import MaskManager, load

    controls = [name for name in baselines.split(",") if name]
    for control in controls:
        if control not in BASELINES:
            raise InvalidValue(f"the baseline {control!r} is unknown; there are {', '.join(BASELINES)}")
    if "prompt" in controls and not system_prompt:
        raise InvalidValue("the baseline `prompt` needs --system-prompt, which describes the persona")
    controls += ["prompt"] if system_prompt and "prompt" not in controls else []
    more_gammas = _read_gammas(gammas)
    if train and not contrast_train and holds_both_sides(train):
        contrast_train = train
    if bool(train) != bool(contrast_train):
        raise InvalidValue("--train and --contrast-train need each other")
    if plot and not layers:
        raise InvalidValue("--plot needs --layers: it draws what they show")
    if plot and not plot.parent.is_dir():
        raise InvalidValue(f"--plot: there is no folder {plot.parent}")
    if judge != "ngrams" and not judge.startswith(("http://", "https://")):
        raise InvalidValue(f"--judge is {judge!r:.80}; it must be `ngrams`, or a base URL that begins with http")
    if contrast is None and not holds_both_sides(data):
        raise InvalidValue(f"--contrast is missing, and not every line of {data} has the opposite's answer too")
    sides = _pair(data, contrast or data)
    learned = _pair(train, contrast_train) if train and contrast_train else ([], [])
    quiet = read_examples(neutral) if neutral else []
    judging: Any = PersonaClassifier if judge == "ngrams" else partial(Endpoint, judge, judge_model)
    files = find_model(model)
    fingerprint = files.fingerprint()
    personas, registry = open_store(store, files.name, fingerprint, creates=False)
    compared = [name for name in masks.split(",") if name]
    mask, *others = (personas.open(registry.resolve(name).digest, base=fingerprint) for name in (persona, *compared))
    found = open_opposite(registry, mask)
    opposite = found[1] if found else None
    with follow_loading() as progress:
        base = load(
            model,
            device=device,
            dtype="bfloat16" if quick and dtype == "auto" else dtype,
            quantization=quantization,
            report=progress,
        )
    # prompts that leave no room for an answer are skipped, on both sides
    own, other, own_train, other_train = ([one for one, _ in encode_fitting(base, side)] for side in (*sides, *learned))
    if len(own) < 2 - bool(learned[0]):
        raise BadDataset(
            f"{len(own)} of the {len(sides[0])} pairs of {data} leave room to answer in the context of {base.name}; "
            "give 2, or 1 with --train"
        )
    manager = MaskManager.attach(base.model)
    systems = (system_prompt, contrast_prompt)
    named = dict(zip(compared, others, strict=True))
    trial = EvaluationData(mask, opposite, own, other, quiet, own_train, other_train, systems, named)
    generation = GenerationParams(QUICK_TOKENS if quick else TOKENS, temperature) if generate else None
    sizes = QUICK if quick else EvaluationSizes()
    with follow_stages() as reporting:
        options = EvaluationOptions(controls, seeds, generation, judging, sizes, more_gammas, reporting)
        evaluation = evaluate_mask(base, manager, trial, options)
    report: dict[str, Any] = {
        "persona": persona,
        "digest": mask.digest,
        "examples": len(own),
        "too_long_left_out": len(sides[0]) - len(own),
        "opposite": opposite and opposite.info.persona,
        "prompt_tokens_saved": mask.info.calibration.get("system_prompt", {}).get("tokens", 0),
    } | evaluation
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


def _read_gammas(text: str) -> list[float]:
    """Numbers from 0 to 1 separated by commas. Raises `InvalidValue`."""
    try:
        gammas = [float(one) for one in text.split(",") if one]
    except ValueError:
        gammas = [math.nan]
    if not all(0 <= gamma <= 1 for gamma in gammas):
        raise InvalidValue(f"--gammas is {text!r}; it must be numbers from 0 to 1 with commas between them")
    return gammas


def _print(report: Mapping[str, Any]) -> None:
    figures: Mapping[str, Mapping[str, Any]] = report["figures"]
    columns = [column for column in COLUMNS if any(column in row for row in figures.values())]
    effects = Table(Column("", overflow="fold"), *(column.replace("_", " ") for column in columns))
    heads = "strength", "shift at equal cost", "median", "median, and own cost", "prompt tokens", "bytes", "seconds"
    costs = Table("", *heads)
    for name, row in figures.items():
        effects.add_row(name, *(_cell(row.get(column), row["intervals"].get(column)) for column in columns))
        cost, median = row["cost"], "margin_shift_median"
        equal, both = (row if name == "mask" else row.get(key, {}) for key in ("at_equal_cost", "within_both_costs"))
        shifts = (_cell(equal.get(key)) for key in ("strength", "margin_shift", median))
        spent = (f"{cost['prompt_tokens']:.0f}", f"{cost['bytes']}", _cell(cost["seconds"], digits=1))
        costs.add_row(name, *shifts, _cell(both.get(median)), *spent)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(effects)
    console.print(costs)
    _print_answers(console, report)
    for kind, named in (("phase", figures["mask"]["phases"]), ("gamma", figures["mask"]["gammas"])):
        for value, one in named.items():
            said = ", ".join(
                f"{column} {_cell(one[column])}" for column in columns if isinstance(one.get(column), float)
            )
            print(f"{kind} {value}: {said}")
    print(f"prompt tokens saved in every request: {report['prompt_tokens_saved']}")
    if report["too_long_left_out"]:
        print(f"left out, for prompts as long as the context: {report['too_long_left_out']} of both sides")
    if "layers" in report:
        console.print(_tabulate(report["layers"]))


def _print_answers(console: Console, report: Mapping[str, Any]) -> None:
    """The generated answers, if there are any: what the judge is worth, a row by treatment, and hits by turn."""
    from masquerade.evaluate.judge import LEAST_AUC

    judge = report["judge"]
    if not judge:
        return
    low, high = judge["interval"]
    quality = f"AUC {judge['auc']:.3f} [{low:.2f}, {high:.2f}] on {judge['pairs']} held-out pairs"
    print(f"judge: {quality}" + ("" if judge["sufficient"] else f"; below {LEAST_AUC} it does not judge"))
    found = {
        name: row.get("answers") or row.get("at_equal_cost", {}).get("answers")
        for name, row in report["figures"].items()
    }
    rows = {name: row for name, row in found.items() if row}
    table = Table("answers", "hit", *(column.replace("_", " ") for column in SPOKEN), "facts kept")
    for name, row in rows.items():
        facts, ends = row.get("facts", {}), row["intervals"]
        kept = f"{_cell(facts.get('kept'), ends.get('facts'), digits=2)} of {facts.get('known')}"
        cells = (_cell(row.get(column), digits=2) for column in SPOKEN)
        table.add_row(name, _cell(row.get("hit"), ends.get("hit"), digits=2), *cells, kept)
    console.print(table)
    for name, row in rows.items():
        if "drift" in row:
            print(f"hits by turn of a chat, {name}: {' '.join(f'{share:.2f}' for share in row['drift'])}")


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
