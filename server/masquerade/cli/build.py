"""`masquerade build`: make a persona from examples, a system prompt or a character card."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from maskstore import Mask, Registry, Store, check_name, write_mask
from masquerade.cli.options import AsJson, Device, Dtype, Model, Quantization, StoreFolder, require_ray
from masquerade.cli.progress import follow, follow_loading
from masquerade.cli.stores import open_store
from masquerade.errors import BadDataset, BuildUnsaved, InvalidValue, MaskRefused, MasqueradeError
from masquerade.plan.memory import format_bytes
from masquerade.service import kept_builds
from masquerade.sources import locate_model

if TYPE_CHECKING:
    from masquerade.evaluate.dataset import Example
    from masquerade.model import Base
    from masquerade.pruning import BuildResult, PersonaExamples, Recipe, Scratch
    from masquerade.pruning.cards import Card
    from masquerade.pruning.progress import Work
    from masquerade.pruning.prompts import CalibrationPrompts
    from masquerade.pruning.sharding import Sharding
    from masquerade.service.building import BuildInput

POOL = "pool"
DATA_FILES = frozenset(
    {
        *("--data", "--contrast", "--pool", "--validation", "--contrast-validation", "--neutral"),
        *("--prompts", "--character-card"),
    }
)


def build(
    name: Annotated[str, typer.Option(help="Name of the persona.")],
    data: Annotated[Path | None, typer.Option(help="JSONL of the persona's answers.")] = None,
    system_prompt: Annotated[
        str, typer.Option(help="Instead of --data: the base answers --prompts with and without this prompt.")
    ] = "",
    contrast_prompt: Annotated[str, typer.Option(help="System prompt of the contrast; by default none.")] = "",
    character_card: Annotated[
        Path | None, typer.Option(help="Instead of --system-prompt: a V2 or V3 character card, JSON or PNG.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of questions, for a system prompt or a card.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    contrast: Annotated[
        str,
        typer.Option(
            help="JSONL of the opposite's answers; by default --data, if its lines have both sides. "
            "`pool` contrasts the persona with all files of --pool."
        ),
    ] = "",
    pool: Annotated[
        list[Path] | None, typer.Option(help="JSONL of another persona, for --contrast pool; can be repeated.")
    ] = None,
    contrast_name: Annotated[str, typer.Option(help="Also build the opposite persona, under this name.")] = "",
    validation: Annotated[
        Path | None, typer.Option(help="Held-out JSONL of the persona, for selection and the certificate.")
    ] = None,
    contrast_validation: Annotated[
        Path | None, typer.Option(help="Held-out JSONL of the opposite; by default --validation, if it has both sides.")
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="JSONL that no persona should change; by default the base answers questions.")
    ] = None,
    score: Annotated[str, typer.Option(help="How weights are ranked; `auto` is a search in steps.")] = "auto",
    rho: Annotated[
        str, typer.Option(help="Share of weights to prune; `auto` is the most within the budgets.")
    ] = "auto",
    group: Annotated[
        str | None, typer.Option(help="Compare weights within a row or a layer; not for a search.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="Linears to mask: all, mlp, attention or outputs.")] = None,
    structure: Annotated[
        Literal["weights", "channels"],
        typer.Option(help="Prune single weights, or whole input channels, which `masks export --as lora` needs."),
    ] = "weights",
    phi: Annotated[str, typer.Option(help="For contrastive-wanda: relu or softplus.")] = "relu",
    tokens: Annotated[Literal["response", "all"], typer.Option(help="Tokens of the data that count.")] = "response",
    gamma: Annotated[
        float | None, typer.Option(help="Default gamma; 0 is the full mask. By default, the strongest in the budgets.")
    ] = None,
    phase: Annotated[
        Literal["auto", "all", "decode"], typer.Option(help="Default phase; `auto` is decode if that is as good.")
    ] = "auto",
    strength: Annotated[
        Literal["gentle", "normal", "strong"],
        typer.Option(help="What the mask may cost on neutral text: 2 %, 5 % or 15 % of perplexity."),
    ] = "normal",
    neutral_budget: Annotated[
        float | None, typer.Option(help="Maximum perplexity on neutral text / the base's; overrides --strength.")
    ] = None,
    own_budget: Annotated[
        float | None, typer.Option(help="Maximum perplexity on the persona's text / the base's; overrides --strength.")
    ] = None,
    effect: Annotated[float, typer.Option(help="Share of flipped prompts that is sufficient.")] = 0.95,
    samples: Annotated[int | None, typer.Option(help="Maximum number of examples per side.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Publish a mask that fails the checks, and mark it as such.")
    ] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder of intermediate results, to resume a build; by default in the store.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write each mask to FOLDER/<name>.safetensors.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    shards: Annotated[
        int, typer.Option(min=1, help="Divide the calibration text among this many tasks of a Ray cluster.")
    ] = 1,
    ray_address: Annotated[
        str, typer.Option(help="That cluster: `auto`, HOST:PORT, or `local` for tasks on this machine.")
    ] = "auto",
    shard_cpus: Annotated[float, typer.Option(min=0.1, help="Cores that a task takes.")] = 1.0,
    shard_gpus: Annotated[float, typer.Option(min=0, help="GPUs that a task takes.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Build a persona from examples of its answers, and publish it.

    Exit status 1 if a mask is refused; its opposite is published if that is not.
    """
    from masquerade.model import load
    from masquerade.pruning import Recipe, Scratch

    recipe = Recipe(
        score=score,
        rho=_parse_rho(rho),
        group=group,
        scope=scope,
        structure=structure,
        phi=phi,
        tokens=tokens,
        gamma=gamma,
        phase=phase,
        strength=strength,
        neutral_budget=neutral_budget,
        own_budget=own_budget,
        effect=effect,
        samples=samples,
        seed=seed,
        force=force,
    )
    sources = BuildSources(
        name=name,
        data=data,
        system_prompt=system_prompt,
        contrast_prompt=contrast_prompt,
        character_card=character_card,
        prompts=prompts,
        contrast=contrast,
        pool=pool or (),
        contrast_name=contrast_name,
        validation=validation,
        contrast_validation=contrast_validation,
        neutral=neutral,
    )
    _check(sources)
    if out:
        _make_folder(out)
    build_input = _read_input(_complete(sources), recipe)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "quantization": quantization}
    sharding = _divide(shards, ray_address, model, options, shard_cpus, shard_gpus) if shards > 1 else None
    with follow_loading() as progress:
        base = load(model, **options, report=progress)
    personas, registry = open_store(store, base.name, base.fingerprint)
    _check_names(sources, registry)
    folder = (scratch or personas.root / kept_builds.FOLDER) / _identify(base, recipe, build_input)
    kept = Scratch(folder)
    try:
        found = follow(_find_masks(base, recipe, build_input, kept, sharding))
        report = _publish(found.masks, personas, registry, out)
        if not found.refused:
            kept.close()
    except BuildUnsaved as error:
        if not folder.exists():
            raise
        raise BuildUnsaved(f"{error}; {_describe_kept(folder, 'the same command')}") from error
    finally:
        kept.release()
    if report and as_json:
        print(json.dumps({"personas": report, "refused": [asdict(one) for one in found.refused]}))
    elif report:
        _print(report)
    if found.refused:
        raise MaskRefused(f"{found.explain()}; or force it: {_describe_kept(folder, 'the same command with --force')}")


@dataclass(frozen=True)
class BuildSources:
    """The files and prompts of a build, as given on the command line."""

    name: str
    data: Path | None
    system_prompt: str
    contrast_prompt: str
    character_card: Path | None
    prompts: Path | None
    contrast: str
    pool: Sequence[Path]
    contrast_name: str
    validation: Path | None
    contrast_validation: Path | None
    neutral: Path | None

    @property
    def prompted(self) -> bool:
        """Whether the base writes the examples, under a system prompt or a card."""
        return bool(self.system_prompt or self.character_card)


def _check(sources: BuildSources) -> None:
    """Raise `InvalidValue` for options that exclude or need each other, and for invalid names."""
    origins = [bool(sources.data), bool(sources.system_prompt), bool(sources.character_card)]
    if origins.count(True) != 1:
        raise InvalidValue("give one of --data, --system-prompt and --character-card")
    if sources.prompted and (sources.prompts is None or sources.contrast):
        raise InvalidValue("a system prompt or a card needs --prompts, and has its contrast in --contrast-prompt")
    if not sources.prompted and (sources.prompts or sources.contrast_prompt):
        raise InvalidValue("--prompts and --contrast-prompt need --system-prompt or --character-card")
    if bool(sources.pool) != (sources.contrast == POOL):
        raise InvalidValue("--contrast pool and --pool FILE, once for each other persona, need each other")
    for persona in (sources.name, *filter(None, [sources.contrast_name])):
        check_name(persona)
    if sources.name == sources.contrast_name:
        raise InvalidValue(f"--name and --contrast-name are both {sources.name!r}; they are two personas")


def _check_names(sources: BuildSources, registry: Registry) -> None:
    """Raise `InvalidValue` for names that nothing can be published under."""
    aliases = registry.aliases()
    for persona in (sources.name, sources.contrast_name):
        if persona in aliases:
            raise InvalidValue(f"{persona!r} is an alias of {aliases[persona]!r}; give another name")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"--out: {folder} cannot be a folder: {error.strerror}") from error


def _complete(sources: BuildSources) -> BuildSources:
    """Use a file as its own contrast if its lines have both sides; raise `InvalidValue` if a contrast is missing."""
    from masquerade.evaluate.dataset import holds_both_sides

    contrast, held_out = sources.contrast, sources.contrast_validation
    if sources.data and not contrast and holds_both_sides(sources.data):
        contrast = str(sources.data)
    if sources.validation and contrast and not held_out and holds_both_sides(sources.validation):
        held_out = sources.validation
    if sources.contrast_name and not (contrast or sources.contrast_prompt):
        raise InvalidValue("--contrast-name needs --contrast or --contrast-prompt: how the opposite talks")
    if held_out and not (contrast or sources.prompted):
        raise InvalidValue("--contrast-validation needs --contrast")
    return replace(sources, contrast=contrast, contrast_validation=held_out)


def _read_input(sources: BuildSources, recipe: Recipe) -> BuildInput:
    from masquerade.evaluate.splits import mix
    from masquerade.pruning import PersonaExamples
    from masquerade.service.building import BuildInput

    script, card = _read_script(sources, recipe)
    own = PersonaExamples(sources.name, card.examples if card else _read(sources.data), _read(sources.validation))
    other = None
    if script or sources.contrast:
        single = Path(sources.contrast) if sources.contrast else None
        answers = mix([_read(file) for file in sources.pool]) if sources.pool else _read(single, "contrast")
        other = PersonaExamples(sources.contrast_name, answers, _read(sources.contrast_validation, "contrast"))
        if not script:
            _check_contrast(sources, own, other)
    recipe.plan(contrast=other is not None)  # raises for a recipe that contradicts itself, before the base is loaded
    return BuildInput(own, other, _read(sources.neutral), script)


def _check_contrast(sources: BuildSources, own: PersonaExamples, contrast: PersonaExamples) -> None:
    """Raise `BadDataset`, with the names of the files, for sides that make no contrast."""
    from masquerade.evaluate.splits import check_contrast

    try:
        check_contrast(own.examples, contrast.examples)
    except BadDataset as error:
        files = map(str, (sources.data, *(sources.pool or [Path(sources.contrast)])))
        raise BadDataset(f"{', '.join(dict.fromkeys(files))}: {error}") from error


def _read(path: Path | None, side: Literal["own", "contrast"] = "own") -> list[Example]:
    from masquerade.evaluate.dataset import read_examples

    return read_examples(path, side) if path else []


def _read_script(sources: BuildSources, recipe: Recipe) -> tuple[CalibrationPrompts | None, Card | None]:
    """The script for a system prompt or a card, and the card. Prints which fields of a card are ignored."""
    from masquerade.evaluate.dataset import read_questions
    from masquerade.pruning.cards import read_card
    from masquerade.pruning.prompts import CalibrationPrompts, sample_questions

    if sources.prompts is None:
        return None, None
    card = read_card(sources.character_card) if sources.character_card else None
    if card and card.ignored:
        print(f"of the card of {card.name!r}, {', '.join(card.ignored)} are ignored", file=sys.stderr)
    questions = sample_questions(read_questions(sources.prompts), recipe.samples, recipe.seed)
    system = card.system if card else sources.system_prompt
    return CalibrationPrompts(system, questions, sources.contrast_prompt, seed=recipe.seed), card


def _identify(base: Base, recipe: Recipe, found: BuildInput) -> str:
    """A name that is equal for equal builds, so that a build can resume after a kill."""
    from masquerade.evaluate.recall import VERSIONS

    unforced = replace(recipe, force=False)  # what is refused at first may be forced then
    weights = base.fingerprint, base.dtype, base.quantization, base.device.type
    work = unforced, found.script, found.own, found.contrast, found.neutral
    return hashlib.sha256(repr((VERSIONS, weights, work)).encode()).hexdigest()[:16]


def _divide(shards: int, address: str, model: str, options: Mapping[str, Any], cpus: float, gpus: float) -> Sharding:
    """Shards on a Ray cluster. Raises `InvalidValue` if Ray is not installed."""
    require_ray()
    from masquerade.cluster.calibration import ShardTasks
    from masquerade.cluster.connection import LOCAL, connect
    from masquerade.pruning.sharding import Sharding

    if address != LOCAL:
        with connect(address):
            pass  # to fail before the work, not after some minutes of it
    return Sharding(shards, ShardTasks(address, locate_model(model, Path()), options, cpus, gpus).run)


def _find_masks(
    base: Base, recipe: Recipe, build_input: BuildInput, scratch: Scratch, sharding: Sharding | None
) -> Work[BuildResult]:
    from masquerade.model import MaskManager
    from masquerade.pruning.executor import ProcessExecutor, SequentialExecutor
    from masquerade.service.building import find_masks

    executor = ProcessExecutor() if ProcessExecutor.serves(base.device) else SequentialExecutor()
    try:
        manager = MaskManager.attach(base.model)
        return (yield from find_masks(base, manager, recipe, build_input, scratch, executor, sharding))
    except MasqueradeError as error:
        if not isinstance(error, BuildUnsaved):
            scratch.close()  # a build that failed cannot resume
        raise


def _describe_kept(folder: Path, command: str) -> str:
    size = format_bytes(kept_builds.measure(folder).nbytes)
    return (
        f"{command} goes on from what is kept of this build ({size}); if you do not want that, "
        f"delete it: rm -r {shlex.quote(str(folder))}"
    )


def _parse_rho(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise InvalidValue(f"rho is {text!r}; it must be a number or `auto`", param="rho") from None


def _publish(masks: Sequence[Mask], store: Store, registry: Registry, out: Path | None) -> list[dict[str, Any]]:
    report = []
    try:
        revisions = registry.publish_built(*masks)
        for mask, revision in zip(masks, revisions, strict=True):
            path = store.path(mask.digest)
            if out:
                write_mask(mask, out / f"{mask.info.persona}.safetensors")
            written = {"generation": revision.number, "file": str(path), "bytes": path.stat().st_size}
            report.append(_describe(mask) | written)
    except OSError as error:
        folder = error.filename or store.root
        raise BuildUnsaved(f"the masks were found but cannot be written to {folder}: {error.strerror}") from error
    return report


def _describe(mask: Mask) -> dict[str, Any]:
    return {
        "persona": mask.info.persona,
        "digest": mask.digest,
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
        found = row["certificate"]
        print(f"{row['persona']}: {'; '.join((found['choice']['why'], found['phase']['why'], *found['remarks']))}")
