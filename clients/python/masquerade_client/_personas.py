"""The calls of `/v1/personas`.

`expected` is the digest that must be current for a change to apply; otherwise the change raises `Conflict`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack, cast
from urllib.parse import quote

from ._calls import AsyncRuns, Call, Runs, check_options, decoder, list_decoder
from ._types import Diff, Persona, PersonaChanges

File = str | os.PathLike[str]
ROOT = "/v1/personas"


def list_(tag: str | None) -> Call[list[Persona]]:
    """All personas, or those with a tag."""
    return Call("GET", ROOT, _read_list, params=None if tag is None else {"tag": tag}, again=True)


def get(name: str) -> Call[Persona]:
    """One persona, with all fields."""
    return Call("GET", _at(name), _read, again=True)


def diff(a: str, b: str) -> Call[Diff]:
    """The difference of two personas."""
    return Call("GET", f"{_at(a)}/diff/{quote(b, safe='@')}", _read_diff, again=True)


def update(name: str, changes: Mapping[str, Any]) -> Call[Persona]:
    """Set the fields in `changes`, which are those of `PersonaChanges`."""
    check_options(changes, PersonaChanges)
    given = {field: value for field, value in changes.items() if field == "gamma" or value is not None}
    return Call("PATCH", _at(name), _read, json=given, again=True)


def compose(name: str, expression: str, expected: str | None, force: bool) -> Call[Persona]:
    """Compose a persona of others."""
    body = {"name": name, "expression": expression, "force": force}
    return Call("POST", f"{ROOT}/compose", _read, json=body, headers=_if(expected), changes=True)


def rename(name: str, to: str, expected: str | None) -> Call[Persona]:
    """Rename a persona."""
    return Call("POST", f"{_at(name)}/rename", _read, json={"name": to}, headers=_if(expected), changes=True)


def rollback(name: str, to: int | str | None, expected: str | None) -> Call[Persona]:
    """Make an older generation current."""
    return Call("POST", f"{_at(name)}/rollback", _read, json={"to": to}, headers=_if(expected), changes=True)


def alias(alias: str, persona: str) -> Call[Persona]:
    """Make an alias."""
    return Call("PUT", f"/v1/aliases/{quote(alias, safe='')}", _read, json={"persona": persona}, again=True)


def pin(name: str, pinned: bool) -> Call[Persona]:
    """Pin or unpin a mask."""
    return Call("PUT" if pinned else "DELETE", f"{_at(name)}/pin", _read, again=True)


def delete(name: str, expected: str | None) -> Call[None]:
    """Delete a persona with its history."""
    return Call("DELETE", _at(name), lambda _: None, headers=_if(expected), changes=True)


def export(name: str) -> Call[bytes]:
    """The mask of a persona, as a file."""
    return Call("GET", f"{_at(name)}/content", lambda response: response.content, again=True)


def import_(name: str, content: bytes, expected: str | None) -> Call[Persona]:
    """Publish a mask file under a name."""
    return Call("PUT", f"{_at(name)}/content", _read, content=content, headers=_if(expected), again=expected is None)


class Personas:
    """`client.personas`."""

    def __init__(self, client: Runs) -> None:
        self._client = client

    def list(self, tag: str | None = None) -> list[Persona]:
        """All personas of the server's base, or those with a tag."""
        return self._client.run(list_(tag))

    def get(self, name: str) -> Persona:
        """A persona, by name or alias, with its history, parameters and certificate."""
        return self._client.run(get(name))

    def diff(self, a: str, b: str) -> Diff:
        """The difference of two personas or generations (`name@digest`)."""
        return self._client.run(diff(a, b))

    def update(self, name: str, **changes: Unpack[PersonaChanges]) -> Persona:
        """Set the default gamma, the notes or the tags; see `PersonaChanges`."""
        return self._client.run(update(name, cast(Mapping[str, Any], changes)))

    def compose(self, name: str, expression: str, *, expected: str | None = None, force: bool = False) -> Persona:
        """Compose a persona of others, such as `"gloomy | formal"`; one that prunes nothing needs `force`."""
        return self._client.run(compose(name, expression, expected, force))

    def rename(self, name: str, to: str, *, expected: str | None = None) -> Persona:
        """Rename a persona, with its history, aliases and tags."""
        return self._client.run(rename(name, to, expected))

    def rollback(self, name: str, to: int | str | None = None, *, expected: str | None = None) -> Persona:
        """Make an older generation current, by number or digest; by default the previous one."""
        return self._client.run(rollback(name, to, expected))

    def alias(self, alias_: str, persona: str) -> Persona:
        """Make an alias of a persona."""
        return self._client.run(alias(alias_, persona))

    def pin(self, name: str) -> Persona:
        """Keep the mask of a persona or generation even if its name is deleted."""
        return self._client.run(pin(name, True))

    def unpin(self, name: str) -> Persona:
        """Undo `pin`."""
        return self._client.run(pin(name, False))

    def delete(self, name: str, *, expected: str | None = None) -> None:
        """Delete a persona with its history and aliases, or only an alias."""
        return self._client.run(delete(name, expected))

    def export(self, name: str, path: File) -> None:
        """Write the mask of a persona or generation to a file."""
        Path(path).write_bytes(self._client.run(export(name)))

    def import_(self, name: str, path: File, *, expected: str | None = None) -> Persona:
        """Publish a mask file under a name, after the server has verified it."""
        return self._client.run(import_(name, Path(path).read_bytes(), expected))


class AsyncPersonas:
    """`client.personas` of `AsyncClient`; its methods are those of `Personas`."""

    def __init__(self, client: AsyncRuns) -> None:
        self._client = client

    async def list(self, tag: str | None = None) -> list[Persona]:
        """All personas of the server's base, or those with a tag."""
        return await self._client.run(list_(tag))

    async def get(self, name: str) -> Persona:
        """A persona, by name or alias, with its history, parameters and certificate."""
        return await self._client.run(get(name))

    async def diff(self, a: str, b: str) -> Diff:
        """The difference of two personas or generations (`name@digest`)."""
        return await self._client.run(diff(a, b))

    async def update(self, name: str, **changes: Unpack[PersonaChanges]) -> Persona:
        """Set the default gamma, the notes or the tags; see `PersonaChanges`."""
        return await self._client.run(update(name, cast(Mapping[str, Any], changes)))

    async def compose(self, name: str, expression: str, *, expected: str | None = None, force: bool = False) -> Persona:
        """Compose a persona of others, such as `"gloomy | formal"`; one that prunes nothing needs `force`."""
        return await self._client.run(compose(name, expression, expected, force))

    async def rename(self, name: str, to: str, *, expected: str | None = None) -> Persona:
        """Rename a persona, with its history, aliases and tags."""
        return await self._client.run(rename(name, to, expected))

    async def rollback(self, name: str, to: int | str | None = None, *, expected: str | None = None) -> Persona:
        """Make an older generation current, by number or digest; by default the previous one."""
        return await self._client.run(rollback(name, to, expected))

    async def alias(self, alias_: str, persona: str) -> Persona:
        """Make an alias of a persona."""
        return await self._client.run(alias(alias_, persona))

    async def pin(self, name: str) -> Persona:
        """Keep the mask of a persona or generation even if its name is deleted."""
        return await self._client.run(pin(name, True))

    async def unpin(self, name: str) -> Persona:
        """Undo `pin`."""
        return await self._client.run(pin(name, False))

    async def delete(self, name: str, *, expected: str | None = None) -> None:
        """Delete a persona with its history and aliases, or only an alias."""
        return await self._client.run(delete(name, expected))

    async def export(self, name: str, path: File) -> None:
        """Write the mask of a persona or generation to a file."""
        mask = await self._client.run(export(name))
        Path(path).write_bytes(mask)

    async def import_(self, name: str, path: File, *, expected: str | None = None) -> Persona:
        """Publish a mask file under a name, after the server has verified it."""
        return await self._client.run(import_(name, Path(path).read_bytes(), expected))


def _at(name: str) -> str:
    return f"{ROOT}/{quote(name, safe='@')}"


def _if(expected: str | None) -> dict[str, str]:
    return {} if expected is None else {"If-Match": f'"{expected}"'}


_read = decoder("a persona", Persona.from_json)
_read_diff = decoder("a difference of personas", Diff.from_json)
_read_list = list_decoder("personas", Persona.from_json)
