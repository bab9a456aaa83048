"""Names, defaults and revisions of personas: `set`, `rename`, `alias`, `rollback`, `pin`, `unpin`, `rm`, `trim`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from masquerade.cli.masks.common import Persona, identify, open_registry, say
from masquerade.cli.options import AsJson, Model, StoreFolder


def set_defaults(
    persona: Persona,
    gamma: Annotated[float | None, typer.Option(help="Gamma of requests that do not set one.")] = None,
    mask_gamma: Annotated[bool, typer.Option("--mask-gamma", help="Reset the default gamma to the mask's.")] = False,
    note: Annotated[str | None, typer.Option(help="Free text about the persona.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Add a tag; can be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Remove a tag; can be repeated.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Set a persona's default gamma, note and tags; options not given change nothing."""
    registry = open_registry(model, store)
    if mask_gamma or gamma is not None:
        registry.set_gamma(persona, None if mask_gamma else gamma)
    if note is not None:
        registry.note(persona, note)
    registry.tag(persona, *(tag or ()))
    registry.untag(persona, *(untag or ()))
    known = registry.describe(persona)
    text = (
        f"{known.name}: gamma {known.gamma if known.gamma is not None else 'of the mask'}, tags {' '.join(known.tags)}"
    )
    say(as_json, asdict(known), text)


def rename(persona: str, new: str, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Rename a persona, with its history, aliases and tags."""
    revision = open_registry(model, store).rename(persona, new)
    say(as_json, identify(revision), f"{persona} is now {new}")


def alias(alias: str, persona: str, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Make an alias of a persona, which follows its current revision."""
    registry = open_registry(model, store)
    registry.alias(alias, persona)
    say(as_json, asdict(registry.describe(persona)), f"{alias} means {persona}")


def roll_back(
    persona: Persona,
    to: Annotated[str | None, typer.Option(help="Number or digest of a revision; by default the previous one.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make an older revision current again."""
    target = int(to) if to and to.isdigit() and len(to) < 8 else to
    revision = open_registry(model, store).rollback(persona, target)
    say(as_json, identify(revision), f"{revision.name}: generation {revision.number} is current")


def pin(persona: Persona, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Exclude a revision's mask from `masks gc`, even if its name is removed."""
    registry = open_registry(model, store)
    revision = registry.resolve(persona)
    registry.pin(revision.digest)
    say(as_json, identify(revision), f"{revision.digest[:8]} is pinned")


def unpin(persona: Persona, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Undo `masks pin`."""
    registry = open_registry(model, store)
    revision = registry.resolve(persona)
    registry.unpin(revision.digest)
    say(as_json, identify(revision), f"{revision.digest[:8]} is not pinned any more")


def remove(
    persona: Annotated[str, typer.Argument(help="A persona, with its history and aliases, or an alias alone.")],
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove a persona or an alias. Its masks stay until `masks gc`."""
    open_registry(model, store).remove(persona)
    say(as_json, {"removed": persona}, f"{persona} is forgotten; `masks gc` frees what nothing refers to")


def trim(
    persona: Persona,
    keep: Annotated[int, typer.Option(min=1, help="Number of newest revisions to keep.")] = 10,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove a persona's old revisions from its history, never the current one."""
    removed = open_registry(model, store).trim(persona, keep)
    text = f"{persona}: {len(removed)} generations are forgotten; `masks gc` frees what nothing refers to"
    say(as_json, {"forgotten": [identify(revision) for revision in removed]}, text)
