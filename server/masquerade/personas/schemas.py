"""Bodies of requests that change personas and aliases."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from masquerade.http.wire import Schema, Text, show


class Command(Schema, extra="forbid"):
    """A body that changes the registry. An unknown field is refused, because ignoring it would leave it undone."""


class Change(Command):
    """What a PATCH sets; absent fields stay. A gamma of null restores the default of the mask."""

    model_config = show({"gamma": 0.2, "notes": "for rainy days", "tags": ["npc"]})

    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    notes: Text | None = None
    tags: list[Text] | None = None


class Composition(Command):
    """A new revision of `name` from an expression over personas, such as `a | b - c`."""

    model_config = show({"name": "moody", "expression": "gloomy | cheerful"})

    name: Text
    expression: Text
    force: bool = False  # publish even a mask that prunes nothing


class Renaming(Command):
    """The new name."""

    model_config = show({"name": "sombre"})

    name: Text


class Rollback(Command):
    """Number or digest prefix of a revision; by default the one before the current."""

    model_config = show({"to": 1})

    to: int | Text | None = None


class AliasTarget(Command):
    """The persona an alias stands for."""

    model_config = show({"persona": "gloomy"})

    persona: Text
