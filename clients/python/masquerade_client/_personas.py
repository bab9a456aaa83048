"""The personas of a server: looked at, changed, brought in and taken out.

Knows the routes of `/v1/personas`. `expected` is the digest that must be current for a change to happen, so that
nobody's change is lost; what has changed in between is a `Conflict`. Refuses to know how to wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import httpx

from ._calls import Call
from ._types import Diff, Persona, decoding

T = TypeVar("T")
File = str | os.PathLike[str]
ROOT = "/v1/personas"


def list_(tag: str | None) -> Call[list[Persona]]:
    """All of them, or those with a tag."""
    return Call("GET", ROOT, _read_list, params=None if tag is None else {"tag": tag}, again=True)


def get(name: str) -> Call[Persona]:
    """One of them, in full."""
    return Call("GET", _at(name), _read, again=True)


def diff(a: str, b: str) -> Call[Diff]:
    """How two differ."""
    return Call("GET", f"{_at(a)}/diff/{quote(b, safe='@')}", _read_diff, again=True)


def update(name: str, changes: dict[str, Any]) -> Call[Persona]:
    """Set what `changes` names."""
    return Call("PATCH", _at(name), _read, json=changes, again=True)


def compose(name: str, expression: str, expected: str | None, force: bool) -> Call[Persona]:
    """A persona of others."""
    body = {"name": name, "expression": expression, "force": force}
    return Call("POST", f"{ROOT}/compose", _read, json=body, headers=_if(expected))


def rename(name: str, to: str, expected: str | None) -> Call[Persona]:
    """Another name."""
    return Call("POST", f"{_at(name)}/rename", _read, json={"name": to}, headers=_if(expected))


def rollback(name: str, to: int | str | None, expected: str | None) -> Call[Persona]:
    """An older generation."""
    return Call("POST", f"{_at(name)}/rollback", _read, json={"to": to}, headers=_if(expected))


def alias(alias: str, persona: str) -> Call[Persona]:
    """A second name."""
    return Call("PUT", f"/v1/aliases/{quote(alias, safe='')}", _read, json={"persona": persona}, again=True)


def pin(name: str, pinned: bool) -> Call[Persona]:
    """Kept whatever happens to its name, or not."""
    return Call("PUT" if pinned else "DELETE", f"{_at(name)}/pin", _read, again=True)


def delete(name: str, expected: str | None) -> Call[None]:
    """Gone, with its history."""
    return Call("DELETE", _at(name), lambda _: None, headers=_if(expected))


def export(name: str) -> Call[bytes]:
    """Its mask."""
    return Call("GET", f"{_at(name)}/content", _read_bytes, again=True)


def import_(name: str, content: bytes, expected: str | None) -> Call[Persona]:
    """A mask under a name."""
    return Call("PUT", f"{_at(name)}/content", _read, content=content, headers=_if(expected), again=expected is None)


def changes(gamma: float | _Unset | None, notes: str | None, tags: Sequence[str] | None) -> dict[str, Any]:
    """The fields of an update that are meant."""
    given: dict[str, Any] = {} if isinstance(gamma, _Unset) else {"gamma": gamma}
    if notes is not None:
        given["notes"] = notes
    if tags is not None:
        given["tags"] = list(tags)
    return given


class _Unset:
    """Of a value that may also be None: not given."""


UNSET = _Unset()


class Runs(Protocol):
    """What waits for the answer to a call."""

    def run(self, call: Call[T], /) -> T:
        """Send it and read the answer."""
        ...


class AsyncRuns(Protocol):
    """What awaits the answer to a call."""

    async def run(self, call: Call[T], /) -> T:
        """Send it and read the answer."""
        ...


class Personas:
    """`client.personas`."""

    def __init__(self, client: Runs) -> None:
        self._client = client

    def list(self, tag: str | None = None) -> list[Persona]:
        """All personas of the server's base, or those that bear a tag."""
        return self._client.run(list_(tag))

    def get(self, name: str) -> Persona:
        """A persona in full: history, how it was built, certificate. An alias will do."""
        return self._client.run(get(name))

    def diff(self, a: str, b: str) -> Diff:
        """How two personas, or generations (`name@digest`), differ."""
        return self._client.run(diff(a, b))

    def update(
        self,
        name: str,
        *,
        gamma: float | _Unset | None = UNSET,
        notes: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> Persona:
        """Set the default gamma (None leaves it to the mask), the notes, the tags. What is not given stays."""
        return self._client.run(update(name, changes(gamma, notes, tags)))

    def compose(self, name: str, expression: str, *, expected: str | None = None, force: bool = False) -> Persona:
        """Make a persona of others, such as `"gloomy | formal"`; one that prunes nothing is refused, unless `force`."""
        return self._client.run(compose(name, expression, expected, force))

    def rename(self, name: str, to: str, *, expected: str | None = None) -> Persona:
        """Give a persona, with all that belongs to it, another name."""
        return self._client.run(rename(name, to, expected))

    def rollback(self, name: str, to: int | str | None = None, *, expected: str | None = None) -> Persona:
        """Make an older generation current: its number, its digest, or the one before."""
        return self._client.run(rollback(name, to, expected))

    def alias(self, alias_: str, persona: str) -> Persona:
        """Let a second name mean a persona."""
        return self._client.run(alias(alias_, persona))

    def pin(self, name: str) -> Persona:
        """Keep the mask of a persona or generation whatever happens to its name."""
        return self._client.run(pin(name, True))

    def unpin(self, name: str) -> Persona:
        """Let go of a pinned mask."""
        return self._client.run(pin(name, False))

    def delete(self, name: str, *, expected: str | None = None) -> None:
        """Forget a persona with its history and aliases, or an alias alone."""
        return self._client.run(delete(name, expected))

    def export(self, name: str, path: File) -> None:
        """Write the mask of a persona or generation to a file."""
        Path(path).write_bytes(self._client.run(export(name)))

    def import_(self, name: str, path: File, *, expected: str | None = None) -> Persona:
        """Publish a mask file under a name. The server verifies it in full first."""
        return self._client.run(import_(name, Path(path).read_bytes(), expected))


class AsyncPersonas:
    """`client.personas`, to be awaited; every method does what that of `Personas` does."""

    def __init__(self, client: AsyncRuns) -> None:
        self._client = client

    async def list(self, tag: str | None = None) -> list[Persona]:
        """All personas of the server's base, or those that bear a tag."""
        return await self._client.run(list_(tag))

    async def get(self, name: str) -> Persona:
        """A persona in full: history, how it was built, certificate. An alias will do."""
        return await self._client.run(get(name))

    async def diff(self, a: str, b: str) -> Diff:
        """How two personas, or generations (`name@digest`), differ."""
        return await self._client.run(diff(a, b))

    async def update(
        self,
        name: str,
        *,
        gamma: float | _Unset | None = UNSET,
        notes: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> Persona:
        """Set the default gamma (None leaves it to the mask), the notes, the tags. What is not given stays."""
        return await self._client.run(update(name, changes(gamma, notes, tags)))

    async def compose(self, name: str, expression: str, *, expected: str | None = None, force: bool = False) -> Persona:
        """Make a persona of others, such as `"gloomy | formal"`; one that prunes nothing is refused, unless `force`."""
        return await self._client.run(compose(name, expression, expected, force))

    async def rename(self, name: str, to: str, *, expected: str | None = None) -> Persona:
        """Give a persona, with all that belongs to it, another name."""
        return await self._client.run(rename(name, to, expected))

    async def rollback(self, name: str, to: int | str | None = None, *, expected: str | None = None) -> Persona:
        """Make an older generation current: its number, its digest, or the one before."""
        return await self._client.run(rollback(name, to, expected))

    async def alias(self, alias_: str, persona: str) -> Persona:
        """Let a second name mean a persona."""
        return await self._client.run(alias(alias_, persona))

    async def pin(self, name: str) -> Persona:
        """Keep the mask of a persona or generation whatever happens to its name."""
        return await self._client.run(pin(name, True))

    async def unpin(self, name: str) -> Persona:
        """Let go of a pinned mask."""
        return await self._client.run(pin(name, False))

    async def delete(self, name: str, *, expected: str | None = None) -> None:
        """Forget a persona with its history and aliases, or an alias alone."""
        return await self._client.run(delete(name, expected))

    async def export(self, name: str, path: File) -> None:
        """Write the mask of a persona or generation to a file."""
        mask = await self._client.run(export(name))
        Path(path).write_bytes(mask)

    async def import_(self, name: str, path: File, *, expected: str | None = None) -> Persona:
        """Publish a mask file under a name. The server verifies it in full first."""
        return await self._client.run(import_(name, Path(path).read_bytes(), expected))


def _at(name: str) -> str:
    return f"{ROOT}/{quote(name, safe='@')}"


def _if(expected: str | None) -> dict[str, str]:
    return {} if expected is None else {"If-Match": f'"{expected}"'}


def _decode(what: str, make: Callable[[Any], T]) -> Callable[[httpx.Response], T]:
    def read(response: httpx.Response) -> T:
        with decoding(what):
            return make(response.json())

    return read


_read = _decode("a persona", Persona.from_json)
_read_diff = _decode("a difference of personas", Diff.from_json)


def _read_bytes(response: httpx.Response) -> bytes:
    return response.content


def _read_list(response: httpx.Response) -> list[Persona]:
    with decoding("a list of personas"):
        return [Persona.from_json(one) for one in response.json()["data"]]
