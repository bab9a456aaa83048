"""Building personas: what is sent, and following a build until it ends.

Knows the one-shot form and the job objects. Refuses to know how a mask is made.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, Unpack, cast

import httpx

from ._calls import Call, check, connecting
from ._errors import BuildFailed, ConnectionFailed
from ._sse import EventDecoder
from ._types import Build, BuildEvent, BuildOptions, Data, decoding

T = TypeVar("T")
JOBS = "/v1/fine_tuning/jobs"
_FILES = ("contrast", "neutral", "validation", "contrast_validation", "card")
Sent = Callable[[int, int], None]  # bytes sent of the data, and bytes in all


def create(name: str, data: Data, sent: Sent | None, options: Mapping[str, Any]) -> Call[Build]:
    """The form of a build. Its key makes sending it again harmless."""
    if unknown := options.keys() - BuildOptions.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(BuildOptions.__annotations__)}")
    files = {"prompts" if {"system_prompt", "card"} & options.keys() else "file": _opener(data, sent)}
    files |= {key: _opener(options[key], None) for key in _FILES if key in options}
    texts = {key: _spell(value) for key, value in options.items() if key not in _FILES}
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    return Call("POST", "/v1/personas", _read, form={"name": name} | texts, files=files, headers=headers, again=True)


def get(build: str) -> Call[Build]:
    """A build as it is now."""
    return Call("GET", f"{JOBS}/{build}", _read, again=True)


def list_(limit: int) -> Call[list[Build]]:
    """The newest builds."""
    return Call("GET", JOBS, _read_list, params={"limit": limit}, again=True)


def cancel(build: str) -> Call[Build]:
    """End a build."""
    return Call("POST", f"{JOBS}/{build}/cancel", _read)


def events(build: str) -> Call[None]:
    """What happens in a build, as it happens, from its beginning."""
    return Call("GET", f"{JOBS}/{build}/events", check, params={"stream": "true"}, again=True)


def judge(build: Build) -> Build:
    """A build that ended well; raises `BuildFailed` for any other end."""
    if build.status != "succeeded":
        why = f" failed: {build.error}" if build.error else f" was {build.status}"
        raise BuildFailed(f"the build of {build.persona!r}{why}", build)
    return build


class Events:
    """Events out of bytes; those that were seen before a connection broke are not told again."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """A new connection."""
        self._decoder = EventDecoder()
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[BuildEvent]:
        """The events that some bytes complete."""
        with decoding("a stream of build events"):
            for text in self._decoder.feed(chunk):
                if text == "[DONE]":
                    self.done = True
                    continue
                event = BuildEvent.from_json(json.loads(text))
                if event.id not in self._seen:
                    self._seen.add(event.id)
                    yield event

    def finish(self) -> None:
        """Raise if the stream broke off."""
        if not self.done:
            raise ConnectionFailed("the connection closed before the build ended")


class Runs(Protocol):
    """What waits for answers."""

    def run(self, call: Call[T], /) -> T:
        """Send a call and read the answer."""
        ...

    def open(self, call: Call[Any], /) -> AbstractContextManager[httpx.Response]:
        """Send a call whose answer is read while it arrives."""
        ...


class AsyncRuns(Protocol):
    """What awaits answers."""

    async def run(self, call: Call[T], /) -> T:
        """Send a call and read the answer."""
        ...

    def open(self, call: Call[Any], /) -> AbstractAsyncContextManager[httpx.Response]:
        """Send a call whose answer is read while it arrives."""
        ...


class Builds:
    """`client.builds`."""

    def __init__(self, client: Runs) -> None:
        self._client = client

    def create(self, name: str, data: Data, *, sent: Sent | None = None, **options: Unpack[BuildOptions]) -> Build:
        """Begin to build a persona from examples, or from questions with a `system_prompt` or a `card`.

        `data` is the path of a JSONL file, or the objects of its lines. `sent` is told how much of it has been sent.
        """
        return self._client.run(create(name, data, sent, cast(Mapping[str, Any], options)))

    def get(self, build: str) -> Build:
        """A build as it is now, by its id."""
        return self._client.run(get(build))

    def list(self, limit: int = 20) -> list[Build]:
        """The newest builds."""
        return self._client.run(list_(limit))

    def cancel(self, build: str) -> Build:
        """End a build: at once if it waits, soon if it runs."""
        return self._client.run(cancel(build))

    def events(self, build: str) -> Iterator[BuildEvent]:
        """What happens in a build, from its beginning, until it ends."""
        yield from self._follow(build, Events())

    def wait(self, build: str, progress: Callable[[BuildEvent], object] | None = None) -> Build:
        """Wait until a build has succeeded; `progress` is told what happens. Survives a restart of the server.

        Raises `BuildFailed` if it ends otherwise.
        """
        seen = Events()
        while True:
            try:
                for event in self._follow(build, seen):
                    if progress:
                        progress(event)
            except ConnectionFailed as error:
                if not error.reached:
                    raise
            now = self.get(build)
            if now.ended:
                return judge(now)

    def _follow(self, build: str, seen: Events) -> Iterator[BuildEvent]:
        seen.begin()
        with self._client.open(events(build)) as response, connecting():
            for chunk in response.iter_bytes():
                yield from seen.feed(chunk)
        seen.finish()


class AsyncBuilds:
    """`client.builds`, to be awaited; every method does what that of `Builds` does."""

    def __init__(self, client: AsyncRuns) -> None:
        self._client = client

    async def create(
        self, name: str, data: Data, *, sent: Sent | None = None, **options: Unpack[BuildOptions]
    ) -> Build:
        """Begin to build a persona from examples, or from questions with a `system_prompt` or a `card`.

        `data` is the path of a JSONL file, or the objects of its lines. `sent` is told how much of it has been sent.
        """
        return await self._client.run(create(name, data, sent, cast(Mapping[str, Any], options)))

    async def get(self, build: str) -> Build:
        """A build as it is now, by its id."""
        return await self._client.run(get(build))

    async def list(self, limit: int = 20) -> list[Build]:
        """The newest builds."""
        return await self._client.run(list_(limit))

    async def cancel(self, build: str) -> Build:
        """End a build: at once if it waits, soon if it runs."""
        return await self._client.run(cancel(build))

    async def events(self, build: str) -> AsyncIterator[BuildEvent]:
        """What happens in a build, from its beginning, until it ends."""
        async for event in self._follow(build, Events()):
            yield event

    async def wait(self, build: str, progress: Callable[[BuildEvent], object] | None = None) -> Build:
        """Wait until a build has succeeded; `progress` is told what happens. Survives a restart of the server.

        Raises `BuildFailed` if it ends otherwise.
        """
        seen = Events()
        while True:
            try:
                async for event in self._follow(build, seen):
                    if progress:
                        progress(event)
            except ConnectionFailed as error:
                if not error.reached:
                    raise
            now = await self.get(build)
            if now.ended:
                return judge(now)

    async def _follow(self, build: str, seen: Events) -> AsyncIterator[BuildEvent]:
        seen.begin()
        async with self._client.open(events(build)) as response:
            with connecting():
                async for chunk in response.aiter_bytes():
                    for event in seen.feed(chunk):
                        yield event
        seen.finish()


class _Watched(io.BytesIO):
    """Bytes that tell how far they have been read."""

    def __init__(self, content: bytes, sent: Sent) -> None:
        super().__init__(content)
        self._sent, self._size = sent, len(content)

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self._sent(self.tell(), self._size)
        return piece


def _opener(data: Data, sent: Sent | None) -> Callable[[], tuple[str, IO[bytes]]]:
    """Read once, sent as often as it takes."""
    if isinstance(data, str | os.PathLike):
        name, content = Path(data).name, Path(data).read_bytes()
    else:
        name, content = "examples.jsonl", _lines(data)
    return lambda: (name, _Watched(content, sent) if sent else io.BytesIO(content))


def _lines(objects: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in objects).encode()


def _spell(value: Any) -> str:
    """A value of the form, as text."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _read(response: httpx.Response) -> Build:
    with decoding("a build"):
        return Build.from_json(response.json())


def _read_list(response: httpx.Response) -> list[Build]:
    with decoding("a list of builds"):
        return [Build.from_json(one) for one in response.json()["data"]]
