"""Masks as files, as adapters, and composed of others: `export`, `import`, `compose`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from maskstore import (
    ANY,
    Anything,
    InvalidMaskValue,
    Registry,
    Revision,
    compose_persona,
    export_mask,
    import_mask,
    read_info,
)
from masquerade.cli.masks.common import CommandResult, Expected, Persona, identify, open_registry
from masquerade.cli.options import AcceptTensorSignatures, AsJson, Dtype, Model, RequireSigned, StoreFolder, say
from masquerade.cli.progress import follow_loading
from masquerade.errors import InvalidValue
from masquerade.sources import find_model

if TYPE_CHECKING:
    from masquerade.model import AdapterKind, Base


def write_file(
    persona: Persona,
    file: Annotated[Path | None, typer.Argument(help="Path of the new file, such as NAME.safetensors.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Write the difference to this persona instead, if that is smaller.")
    ] = None,
    kind: Annotated[
        Literal["lora", "shira"] | None,
        typer.Option(
            "--as", help="Write an adapter for other engines instead: a LoRA of whole channels, or a SHiRA of any mask."
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the adapter.")] = None,
    gamma: Annotated[float | None, typer.Option(help="Gamma of the adapter; by default the persona's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file, or write into a folder with files.")] = False,
    dtype: Dtype = "auto",
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write a persona's mask to a file, or as an adapter that PEFT, vLLM, SGLang and llama.cpp load.

    An adapter needs the weights of --model; --dtype is the type in which it holds them.
    """
    adapts = to is not None or gamma is not None or dtype != "auto"
    if kind is None and (file is None or adapts):
        raise InvalidValue("give a FILE for the mask; --to, --gamma and --dtype are for an adapter and need --as")
    if kind is not None and (to is None or file is not None or against is not None):
        raise InvalidValue(f"--as {kind} writes a folder: give --to FOLDER, and neither FILE nor --against")
    registry = open_registry(model, store)
    revision = registry.resolve(persona)
    if not force:
        _check_absent(file or to)
    if file is not None:
        done = _write_mask(registry, revision, file, against)
    elif kind is not None and to is not None:
        from masquerade.model import load

        with follow_loading() as progress:
            base = load(model, device="cpu", dtype=dtype, report=progress)
        done = _write_adapter(base, registry, revision, kind, to, gamma)
    say(as_json, *done)


def _check_absent(path: Path | None) -> None:
    """Raises `InvalidValue` for a file that exists, and for a folder with files."""
    if path is not None and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "has files in it" if path.is_dir() else "exists"
        raise InvalidValue(f"{path} {what}; give another path, or --force to replace what is there")


def _write_mask(registry: Registry, revision: Revision, file: Path, against: str | None) -> CommandResult:
    parent = registry.resolve(against).digest if against else None
    kept = registry.store.summary(revision.digest)
    served = registry.served_info(revision, kept.info)
    done = export_mask(registry.store, revision.digest, file, parent, served)
    kind = f"as a difference to {done.parent[:8]}" if done.parent else "whole"
    text = f"{file}: {revision.name}, {kind}, {done.nbytes} bytes"
    if kept.signature and served != kept.info:
        said, here = (f"{info.persona} at gamma {info.gamma:g} in phase {info.phase}" for info in (kept.info, served))
        text += f"\nits signature covers what it says, {said}; here it is {here}"
    return asdict(done) | {"file": str(file)}, text


def _write_adapter(
    base: Base, registry: Registry, revision: Revision, kind: AdapterKind, folder: Path, gamma: float | None
) -> CommandResult:
    from masquerade.model import export_adapter

    mask = registry.store.open(revision.digest, base=base.fingerprint)
    served = registry.served_info(revision, mask.info)
    gamma = served.gamma if gamma is None else gamma
    done = export_adapter(base, mask, kind, gamma, folder)
    text = f"{folder}: {revision.name} at gamma {gamma:g}, as a {kind} adapter with r {done.rank}, {done.nbytes} bytes"
    if served.phase == "decode":
        text += (
            "\nan adapter applies to the prompt too, as phase `all` does; the persona's own phase is `decode`, and "
            "`masks show` has the figures of both"
        )
    return identify(revision) | asdict(done) | {"gamma": gamma, "phase": "all", "folder": str(folder)}, text


def read_file(
    file: Annotated[Path, typer.Argument(help="A mask file, or a difference to a mask in the store.")],
    name: Annotated[str | None, typer.Option(help="Name of the persona; by default the name in the file.")] = None,
    expect: Expected = None,
    require_signed: RequireSigned = False,
    accept_tensor_signatures: AcceptTensorSignatures = False,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Verify a mask file, add it to the store, and publish it."""
    registry = open_registry(
        model, store, creates=True, require_signed=require_signed, accept_tensors=accept_tensor_signatures
    )
    mask = import_mask(registry.store, file, find_model(model).fingerprint())
    info = mask.info if mask.signature else read_info(file)  # a signed copy in the store says more than a file
    revision = registry.publish(name or info.persona, mask.digest, parse_expected(expect), info)
    say(as_json, identify(revision), f"{revision.name}: generation {revision.number}, {revision.digest}")


def compose_mask(
    registry: Registry,
    words: Annotated[list[str], typer.Argument(metavar='NAME = "EXPRESSION"', help="Such as: quiet = 'a | b - c'")],
    expect: Expected = None,
    force: Annotated[bool, typer.Option("--force", help="Publish a mask even if it prunes nothing.")] = False,
) -> CommandResult:
    """Compose a persona of others: | is the union of what they prune, & intersection, - difference; ~ is complement,
    within the modules that a mask covers.
    """
    name, equals, expression = " ".join(words).partition("=")
    if not (equals and name.strip() and expression.strip()):
        raise InvalidMaskValue(
            f"{' '.join(words)!r:.80} is not NAME = EXPRESSION; for example: masquerade masks compose "
            '"quiet = formal | introvert"'
        )
    revision = compose_persona(registry, name.strip(), expression.strip(), parse_expected(expect), force)
    return identify(revision), f"{revision.name}: generation {revision.number}, {revision.digest}"


def parse_expected(digest: str | None) -> str | Anything | None:
    """The value of --expect as the registry takes it: ANY, None (a new name), or a digest."""
    if digest is None:
        return ANY
    return None if digest == "none" else digest
