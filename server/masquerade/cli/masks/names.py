"""What personas are called and what is kept of them: `set`, `rename`, `alias`, `rollback`, `pin`, `rm`, `trim`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from masquerade.cli.masks.common import Persona, identify, open_registry, say
from masquerade.cli.options import AsJson, Model, StoreFolder


def set_defaults(
    persona: Persona,
    gamma: Annotated[float | None, typer.Option(help="Gamma of requests that name none.")] = None,
    mask_gamma: Annotated[
        bool, typer.Option("--mask-gamma", help="Leave the default gamma to the mask again.")
    ] = False,
    note: Annotated[str | None, typer.Option(help="Free text about the persona.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Add a tag; may be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="Take a tag away; may be repeated.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Set a persona's default gamma, note and tags; what is not named stays."""
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
    """Give a persona, with its history, aliases and tags, another name."""
    generation = open_registry(model, store).rename(persona, new)
    say(as_json, identify(generation), f"{persona} is now {new}")


def alias(alias: str, persona: str, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Let another name mean a persona, whatever is current there."""
    registry = open_registry(model, store)
    registry.alias(alias, persona)
    say(as_json, asdict(registry.describe(persona)), f"{alias} means {persona}")


def roll_back(
    persona: Persona,
    to: Annotated[str | None, typer.Option(help="Number or digest of a generation; by default the one before.")] = None,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make an older generation current again."""
    target = int(to) if to and to.isdigit() and len(to) < 8 else to
    generation = open_registry(model, store).rollback(persona, target)
    say(as_json, identify(generation), f"{generation.name}: generation {generation.number} is current")


def pin(persona: Persona, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Keep a generation's mask, whatever happens to its name."""
    registry = open_registry(model, store)
    generation = registry.resolve(persona)
    registry.pin(generation.digest)
    say(as_json, identify(generation), f"{generation.digest[:8]} is pinned")


def unpin(persona: Persona, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Let go of a pinned mask."""
    registry = open_registry(model, store)
    generation = registry.resolve(persona)
    registry.unpin(generation.digest)
    say(as_json, identify(generation), f"{generation.digest[:8]} is not pinned any more")


def remove(
    persona: Annotated[str, typer.Argument(help="A persona, with its history and aliases, or an alias alone.")],
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Forget a persona. Its masks stay until `masks gc`."""
    open_registry(model, store).remove(persona)
    say(as_json, {"removed": persona}, f"{persona} is forgotten; `masks gc` frees what nothing refers to")


def trim(
    persona: Persona,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest generations stay.")] = 10,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Forget a persona's old generations, never the current one."""
    forgotten = open_registry(model, store).trim(persona, keep)
    text = f"{persona}: {len(forgotten)} generations are forgotten; `masks gc` frees what nothing refers to"
    say(as_json, {"forgotten": [identify(generation) for generation in forgotten]}, text)
