"""`masquerade build`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress as Bars
from rich.table import Table

from maskstore import Mask, Registry, Store, check_name, write_mask
from masquerade import __version__
from masquerade.cli.options import AsJson, Device, Dtype, Model, Quantization, StoreFolder
from masquerade.cli.progress import follow_loading
from masquerade.cli.stores import open_store
from masquerade.errors import BuildFailed, InvalidValue, MasqueradeError

if TYPE_CHECKING:
    from masquerade.evaluate.dataset import Example
    from masquerade.model import Base
    from masquerade.pruning import PersonaExamples, Recipe, Scratch
    from masquerade.pruning.cards import Card
    from masquerade.pruning.progress import Work
    from masquerade.pruning.prompts import CalibrationPrompts

POOL = "pool"
T = TypeVar("T")


def build(
    name: Annotated[str, typer.Option(help="Name of the persona.")],
    data: Annotated[Path | None, typer.Option(help="JSONL of how the persona talks.")] = None,
    system_prompt: Annotated[
        str, typer.Option(help="Instead of --data: the base answers --prompts under this prompt and without it.")
    ] = "",
    contrast_prompt: Annotated[str, typer.Option(help="What it is told instead of nothing, for the contrast.")] = "",
    character_card: Annotated[
        Path | None, typer.Option(help="Instead of --system-prompt: a V2 or V3 character card, JSON or PNG.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of questions, for a prompt or a card.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    contrast: Annotated[
        str,
        typer.Option(
            help="JSONL of how the opposite talks; by default --data itself, where its lines have both sides. "
            "Or `pool`: one persona against all those of --pool."
        ),
    ] = "",
    pool: Annotated[list[Path] | None, typer.Option(help="JSONL of another persona, for --contrast pool.")] = None,
    contrast_name: Annotated[str, typer.Option(help="Build the opposite too, under this name.")] = "",
    validation: Annotated[
        Path | None, typer.Option(help="Held-out JSONL of the persona, to choose and judge by.")
    ] = None,
    contrast_validation: Annotated[
        Path | None, typer.Option(help="Held-out JSONL of the opposite; by default --validation, if it has both sides.")
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="JSONL that no persona should change; by default the base answers questions.")
    ] = None,
    score: Annotated[str, typer.Option(help="What ranks the weights; `auto` compares the best.")] = "auto",
    rho: Annotated[str, typer.Option(help="Share of weights pruned, or `auto`: the most within the budgets.")] = "auto",
    group: Annotated[str | None, typer.Option(help="Compare weights within a row or a layer.")] = None,
    scope: Annotated[str | None, typer.Option(help="Linears to mask: all, mlp, attention or outputs.")] = None,
    phi: Annotated[str, typer.Option(help="Of contrastive-wanda: relu or softplus.")] = "relu",
    tokens: Annotated[Literal["response", "all"], typer.Option(help="Which tokens of the data count.")] = "response",
    gamma: Annotated[float, typer.Option(help="Default gamma of the persona: 0 is the hard mask.")] = 0.0,
    phase: Annotated[
        Literal["auto", "all", "decode"], typer.Option(help="Default phase; `auto` is decode if that is as good.")
    ] = "auto",
    neutral_budget: Annotated[float, typer.Option(help="Most that neutral perplexity may be multiplied with.")] = 1.02,
    own_budget: Annotated[float, typer.Option(help="Most that the persona's own perplexity may be.")] = 1.05,
    effect: Annotated[float, typer.Option(help="Share of flipped prompts that is enough.")] = 0.95,
    samples: Annotated[int | None, typer.Option(help="Most examples of a side.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Publish a mask that would be refused, marked as such.")
    ] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="Where unfinished work lies, to go on after a kill; by default in the store.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write each mask to FOLDER/<name>.safetensors.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Find a persona in a model, from examples of how it talks, and publish it."""
    from masquerade.evaluate.splits import mix
    from masquerade.model import load
    from masquerade.pruning import PersonaExamples, Recipe, Scratch

    recipe = Recipe(
        score=score,
        rho=_parse_rho(rho),
        group=group,
        scope=scope,
        phi=phi,
        tokens=tokens,
        gamma=gamma,
        phase=phase,
        neutral_budget=neutral_budget,
        own_budget=own_budget,
        effect=effect,
        samples=samples,
        seed=seed,
        force=force,
    )
    told = bool(system_prompt or character_card)
    for wrong, words in (
        (
            [bool(data), bool(system_prompt), bool(character_card)].count(True) != 1,
            "give one of --data, --system-prompt and --character-card",
        ),
        (
            told and (prompts is None or contrast),
            "a system prompt or a card needs --prompts, and has its contrast in --contrast-prompt",
        ),
        (
            not told and (prompts or contrast_prompt),
            "--prompts and --contrast-prompt need --system-prompt or --character-card",
        ),
        (
            bool(pool) != (contrast == POOL),
            "--contrast pool and --pool FILE, once for each other persona, need each other",
        ),
    ):
        if wrong:
            raise InvalidValue(words)
    for persona in filter(None, (name, contrast_name)):
        check_name(persona)
    if data and not contrast and _holds_both_sides(data):
        contrast = str(data)
    if validation and contrast and not contrast_validation and _holds_both_sides(validation):
        contrast_validation = validation
    if contrast_name and not (contrast or contrast_prompt):
        raise InvalidValue("--contrast-name needs --contrast or --contrast-prompt: how the opposite talks")
    if contrast_validation and not (contrast or told):
        raise InvalidValue("--contrast-validation needs --contrast")
    script, card = _read_script(system_prompt, contrast_prompt, character_card, prompts, recipe)
    own = PersonaExamples(name, card.examples if card else _read(data), _read(validation))
    answers = mix([_read(file) for file in pool]) if pool else _read(Path(contrast) if contrast else None, "contrast")
    other = (
        PersonaExamples(contrast_name, answers, _read(contrast_validation, "contrast")) if script or contrast else None
    )
    quiet = _read(neutral)
    with follow_loading() as progress:
        base = load(model, device=device, dtype=dtype, quantization=quantization, report=progress)
    personas, registry = open_store(store, base.name, base.fingerprint)
    folder = (scratch or personas.root / "builds") / _identify(base.fingerprint, recipe, script, own, other, quiet)
    masks = _watch(_work(base, recipe, script, own, other, quiet, Scratch(folder)))
    report = _publish(masks, personas, registry, out)
    if as_json:
        print(json.dumps({"personas": report}))
    else:
        _print(report)


def _read(path: Path | None, side: Literal["own", "contrast"] = "own") -> list[Example]:
    from masquerade.evaluate.dataset import read_examples

    return read_examples(path, side) if path else []


def _holds_both_sides(path: Path) -> bool:
    from masquerade.evaluate.dataset import holds_both_sides

    return holds_both_sides(path)


def _read_script(
    system: str, contrast: str, path: Path | None, prompts: Path | None, recipe: Recipe
) -> tuple[CalibrationPrompts | None, Card | None]:
    """What is to be written for a system prompt or a card. What of a card is not used is said."""
    from masquerade.evaluate.dataset import read_questions
    from masquerade.pruning.cards import read_card
    from masquerade.pruning.prompts import CalibrationPrompts, sample_questions

    if prompts is None:  # examples are given
        return None, None
    card = read_card(path) if path else None
    if card and card.ignored:
        print(f"of the card of {card.name!r}, {', '.join(card.ignored)} are ignored", file=sys.stderr)
    questions = sample_questions(read_questions(prompts), recipe.samples, recipe.seed)
    return CalibrationPrompts(card.system if card else system, questions, contrast, seed=recipe.seed), card


def _work(
    base: Base,
    recipe: Recipe,
    script: CalibrationPrompts | None,
    own: PersonaExamples,
    other: PersonaExamples | None,
    neutral: Sequence[Example],
    scratch: Scratch,
) -> Work[list[Mask]]:
    """Have the base write what a script asks for, and find the masks; a build that was killed goes on."""
    from masquerade.model import MaskManager
    from masquerade.pruning import Builder
    from masquerade.pruning.prompts import add_generated

    manager = MaskManager.attach(base.model)
    try:
        if script and other:
            own, other = yield from add_generated(base, script, own, other, scratch)
        return (yield from Builder(base, manager, recipe, own, other, neutral, scratch).run())
    except MasqueradeError:  # there is nothing to go on with
        scratch.close()
        raise


def _parse_rho(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InvalidValue(f"rho is {text!r}; it must be a number or `auto`", param="rho") from None


def _identify(*work: object) -> str:
    """The same for the same work, so that it is found again after a kill."""
    return hashlib.sha256(repr((__version__, work)).encode()).hexdigest()[:16]


def _publish(masks: Sequence[Mask], store: Store, registry: Registry, out: Path | None) -> list[dict[str, Any]]:
    report = []
    try:
        for mask in masks:
            generation = registry.publish_built(mask)
            path = store.path(mask.digest)
            if out:
                out.mkdir(parents=True, exist_ok=True)
                write_mask(mask, out / f"{mask.info.persona}.safetensors")
            report.append(_describe(mask) | {"generation": generation.number, "file": str(path)})
    except OSError as error:
        folder = error.filename or store.root
        raise BuildFailed(f"the masks were found but cannot be written to {folder}: {error.strerror}") from error
    return report


def _watch(work: Work[T]) -> T:
    """Run the work, one bar a stage on stderr."""
    with Bars(console=Console(file=sys.stderr)) as bars:
        stages: dict[str, Any] = {}
        while True:
            try:
                step = next(work)
            except StopIteration as end:
                result: T = end.value
                for stage in stages.values():
                    bars.update(stage, total=bars.tasks[stage].completed)
                return result
            if step.stage not in stages:
                stages[step.stage] = bars.add_task(step.stage, total=step.total)
            bars.update(stages[step.stage], completed=step.done, total=step.total)


def _describe(mask: Mask) -> dict[str, Any]:
    return {
        "persona": mask.info.persona,
        "digest": mask.digest,
        "bytes": mask.nbytes,
        "score": mask.info.score,
        "rho": mask.info.parameters["rho"],
        "phase": mask.info.phase,
        "certificate": {key: value for key, value in mask.info.certificate.items() if key != "pruned_share"},
    }


def _describe_answers(certificate: Mapping[str, Any]) -> str:
    answers = certificate.get("changed_answers")
    return f"{answers['changed']} of {answers['of']}" if answers else "-"


def _print(report: list[dict[str, Any]]) -> None:
    table = Table("", *(row["persona"] for row in report))
    for field in ("digest", "bytes", "score", "rho", "phase"):
        table.add_row(field, *(str(row[field])[:20] for row in report))
    for figure in ("flip", "margin_shift", "own_ratio", "neutral_ratio", "kl", "verdict"):
        table.add_row(figure, *(str(row["certificate"].get(figure, "-")) for row in report))
    table.add_row("changed answers", *(_describe_answers(row["certificate"]) for row in report))
    Console().print(table)
    for row in report:
        told = row["certificate"]
        print(f"{row['persona']}: {'; '.join((told['choice']['why'], told['phase']['why'], *told['remarks']))}")
