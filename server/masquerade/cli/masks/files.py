"""Masks as files, and masks composed of others: `export`, `import`, `compose`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from maskstore import ANY, Anything, InvalidMaskValue, Registry, compose_persona, export_mask, import_mask
from masquerade.cli.masks.common import CommandResult, Expected, Persona, identify, open_registry
from masquerade.cli.options import AcceptTensorSignatures, AsJson, Model, RequireSigned, StoreFolder, say
from masquerade.sources import find_model


def write_file(
    registry: Registry,
    persona: Persona,
    file: Annotated[Path, typer.Argument(help="Path of the new file, such as NAME.safetensors.")],
    against: Annotated[
        str | None, typer.Option(help="Write the difference to this persona instead, if that is smaller.")
    ] = None,
) -> CommandResult:
    """Write a persona's mask to a file."""
    parent = registry.resolve(against).digest if against else None
    done = export_mask(registry.store, registry.resolve(persona).digest, file, parent)
    kind = f"as a difference to {done.parent[:8]}" if done.parent else "whole"
    return asdict(done) | {"file": str(file)}, f"{file}: {persona}, {kind}, {done.nbytes} bytes"


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
    registry = open_registry(model, store, require_signed=require_signed, accept_tensors=accept_tensor_signatures)
    mask = import_mask(registry.store, file, find_model(model).fingerprint())
    revision = registry.publish(name or mask.info.persona, mask.digest, parse_expected(expect))
    say(as_json, identify(revision), f"{revision.name}: generation {revision.number}, {revision.digest}")


def compose_mask(
    registry: Registry,
    words: Annotated[list[str], typer.Argument(metavar='NAME = "EXPRESSION"', help="Such as: quiet = 'a | b - c'")],
    expect: Expected = None,
    force: Annotated[bool, typer.Option("--force", help="Publish a mask even if it prunes nothing.")] = False,
) -> CommandResult:
    """Compose a persona of others: | is the union of what they prune, & intersection, - difference, ~ complement."""
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
