"""Names, defaults and revisions of personas: `set`, `rename`, `alias`, `rollback`, `pin`, `unpin`, `rm`, `trim`."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated

import typer

from maskstore import ANY, MaskNotFound, Registry
from masquerade.cli.masks.common import CommandResult, Persona, identify
from masquerade.errors import InvalidValue

DIGEST = re.compile("[0-9a-f]{8,64}")
Name = Annotated[str, typer.Argument(help="A persona, or an alias.")]


def set_defaults(
    registry: Registry,
    persona: Name,
    gamma: Annotated[float | None, typer.Option(help="Gamma of requests that do not set one.")] = None,
    mask_gamma: Annotated[bool, typer.Option("--mask-gamma", help="Reset the default gamma to the mask's.")] = False,
    note: Annotated[str | None, typer.Option(help="Free text about the persona.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Add a tag; can be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Remove a tag; can be repeated.")] = None,
) -> CommandResult:
    """Set a persona's default gamma, note and tags; options not given change nothing."""
    if mask_gamma and gamma is not None:
        raise InvalidValue("give --gamma or --mask-gamma, not both")
    changed = None if mask_gamma else ANY if gamma is None else gamma
    added, removed = tag or (), untag or ()
    known = registry.change(persona, gamma=changed, notes=note, tags=lambda old: (old | {*added}) - {*removed})
    text = (
        f"{known.name}: gamma {known.gamma if known.gamma is not None else 'of the mask'}, tags {' '.join(known.tags)}"
    )
    return asdict(known), text


def rename(registry: Registry, persona: str, new: str) -> CommandResult:
    """Rename a persona, with its history, aliases and tags."""
    return identify(registry.rename(persona, new)), f"{persona} is now {new}"


def alias(registry: Registry, alias: str, persona: str) -> CommandResult:
    """Make an alias of a persona, which follows its current revision."""
    registry.alias(alias, persona)
    return asdict(registry.describe(persona)), f"{alias} means {persona}"


def roll_back(
    registry: Registry,
    persona: Name,
    to: Annotated[str | None, typer.Option(help="Number or digest of a revision; by default the previous one.")] = None,
) -> CommandResult:
    """Make an older revision current again."""
    target = int(to) if to and to.isascii() and to.isdigit() and len(to) < 8 else to
    revision = registry.rollback(persona, target)
    return identify(revision), f"{revision.name}: generation {revision.number} is current"


def pin(registry: Registry, persona: Persona) -> CommandResult:
    """Exclude a revision's mask from `masks gc`, even if its name is removed."""
    revision = registry.resolve(persona)
    registry.pin(revision.digest)
    return identify(revision), f"{revision.digest[:8]} is pinned"


def unpin(
    registry: Registry,
    persona: Annotated[str, typer.Argument(help="A persona, an alias, name@digest, or the digest of a pinned mask.")],
) -> CommandResult:
    """Undo `masks pin`."""
    try:
        digest = registry.resolve(persona).digest
    except MaskNotFound as error:
        if not DIGEST.fullmatch(persona):  # its name may be gone
            raise error
        digest = registry.find_pin(persona)
    registry.unpin(digest)
    return {"digest": digest}, f"{digest[:8]} is not pinned any more"


def remove(
    registry: Registry,
    persona: Annotated[str, typer.Argument(help="A persona, with its history and aliases, or an alias alone.")],
) -> CommandResult:
    """Remove a persona or an alias. Its masks stay until `masks gc`."""
    registry.remove(persona)
    return {"removed": persona}, f"{persona} is forgotten; `masks gc` frees what nothing refers to"


def trim(
    registry: Registry,
    persona: Name,
    keep: Annotated[int, typer.Option(min=1, help="Number of newest revisions to keep.")] = 10,
) -> CommandResult:
    """Remove a persona's old revisions from its history, never the current one."""
    removed = registry.trim(persona, keep)
    text = f"{persona}: {len(removed)} generations are forgotten; `masks gc` frees what nothing refers to"
    return {"forgotten": [identify(revision) for revision in removed]}, text
