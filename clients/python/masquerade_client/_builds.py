"""Builds of personas: creating them and following their events."""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Unpack, cast

from ._calls import AsyncRuns, Call, Patience, Runs, check, check_options, decoder, http_errors, list_decoder
from ._errors import ApiError, BuildFailed, ConnectionFailed
from ._sse import EventDecoder
from ._types import Build, BuildEvent, BuildOptions, Data, decoding

JOBS = "/v1/fine_tuning/jobs"
_read = decoder("a build", Build.from_json)
_read_list = list_decoder("builds", Build.from_json)
_FILES = ("contrast", "neutral", "validation", "contrast_validation", "card")
Sent = Callable[[int, int], None]  # bytes sent and bytes in total


def create(name: str, data: Data, sent: Sent | None, options: Mapping[str, Any]) -> Call[Build]:
    """Start a build. Its idempotency key makes a retry safe."""
    check_options(options, BuildOptions)
    files = {"prompts" if {"system_prompt", "card"} & options.keys() else "file": _opener(data, sent)}
    files |= {key: _opener(options[key], None) for key in _FILES if key in options}
    texts = {key: _format(value) for key, value in options.items() if key not in _FILES}
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    return Call("POST", "/v1/personas", _read, data={"name": name} | texts, files=files, headers=headers, again=True)


def get(build: str) -> Call[Build]:
    """One build."""
    return Call("GET", f"{JOBS}/{build}", _read, again=True)


def list_(limit: int) -> Call[list[Build]]:
    """The newest builds."""
    return Call("GET", JOBS, _read_list, params={"limit": limit}, again=True)


def cancel(build: str) -> Call[Build]:
    """Cancel a build."""
    return Call("POST", f"{JOBS}/{build}/cancel", _read)


def events(build: str) -> Call[None]:
    """The events of a build, from its beginning, as a stream."""
    return Call("GET", f"{JOBS}/{build}/events", check, params={"stream": "true"}, again=True)


def require_success(build: Build) -> Build:
    """The build, if it succeeded; raises `BuildFailed` otherwise."""
    if build.status != "succeeded":
        why = f" failed: {build.error}" if build.error else f" was {build.status}"
        raise BuildFailed(f"the build of {build.persona!r}{why}", build)
    return build


class Events:
    """Decodes events, and drops those that an earlier connection already delivered.

    `heard` is called for whatever arrives, also between events.
    """

    def __init__(self, heard: Callable[[], object] = lambda: None) -> None:
        self._heard = heard
        self._seen: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Start a new connection."""
        self._decoder = EventDecoder()
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[BuildEvent]:
        """Yield the new events that `chunk` completes."""
        self._heard()
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
        """Raise `ConnectionFailed` unless the stream is complete."""
        if not self.done:
            raise ConnectionFailed("the connection closed before the build ended")


class Builds:
    """`client.builds`."""

    def __init__(self, client: Runs) -> None:
        self._client = client

    def create(self, name: str, data: Data, *, sent: Sent | None = None, **options: Unpack[BuildOptions]) -> Build:
        """Start to build a persona from examples, or from questions with a `system_prompt` or a `card`.

        `data` is the path of a JSONL file, or the objects of its lines. `sent` gets the bytes sent and the total.
        """
        return self._client.run(create(name, data, sent, cast(Mapping[str, Any], options)))

    def get(self, build: str) -> Build:
        """A build by its id."""
        return self._client.run(get(build))

    def list(self, limit: int = 20) -> list[Build]:
        """The newest builds."""
        return self._client.run(list_(limit))

    def cancel(self, build: str) -> Build:
        """Cancel a build: at once if it is queued, after its current step if it runs."""
        return self._client.run(cancel(build))

    def events(self, build: str) -> Iterator[BuildEvent]:
        """The events of a build, from its beginning to its end."""
        yield from self._follow(build, Events())

    def wait(self, build: str, progress: Callable[[BuildEvent], object] | None = None) -> Build:
        """Wait until a build has succeeded; `progress` gets each event. Survives a restart of the server that takes no
        more than five minutes.

        Raises `BuildFailed` if it fails or is cancelled.
        """
        patience = Patience()
        seen = Events(patience.reset)
        while True:
            try:
                for event in self._follow(build, seen):
                    if progress:
                        progress(event)
                current = self.get(build)
                if current.ended:
                    return require_success(current)
            except (ConnectionFailed, ApiError) as error:
                time.sleep(patience.pause(error))

    def _follow(self, build: str, seen: Events) -> Iterator[BuildEvent]:
        seen.begin()
        with self._client.open(events(build)) as response, http_errors():
            for chunk in response.iter_bytes():
                yield from seen.feed(chunk)
        seen.finish()


class AsyncBuilds:
    """`client.builds` of `AsyncClient`; its methods are those of `Builds`."""

    def __init__(self, client: AsyncRuns) -> None:
        self._client = client

    async def create(
        self, name: str, data: Data, *, sent: Sent | None = None, **options: Unpack[BuildOptions]
    ) -> Build:
        """Start to build a persona from examples, or from questions with a `system_prompt` or a `card`.

        `data` is the path of a JSONL file, or the objects of its lines. `sent` gets the bytes sent and the total.
        """
        return await self._client.run(create(name, data, sent, cast(Mapping[str, Any], options)))

    async def get(self, build: str) -> Build:
        """A build by its id."""
        return await self._client.run(get(build))

    async def list(self, limit: int = 20) -> list[Build]:
        """The newest builds."""
        return await self._client.run(list_(limit))

    async def cancel(self, build: str) -> Build:
        """Cancel a build: at once if it is queued, after its current step if it runs."""
        return await self._client.run(cancel(build))

    async def events(self, build: str) -> AsyncIterator[BuildEvent]:
        """The events of a build, from its beginning to its end."""
        async for event in self._follow(build, Events()):
            yield event

    async def wait(self, build: str, progress: Callable[[BuildEvent], object] | None = None) -> Build:
        """Wait until a build has succeeded; `progress` gets each event. Survives a restart of the server that takes no
        more than five minutes.

        Raises `BuildFailed` if it fails or is cancelled.
        """
        patience = Patience()
        seen = Events(patience.reset)
        while True:
            try:
                async for event in self._follow(build, seen):
                    if progress:
                        progress(event)
                current = await self.get(build)
                if current.ended:
                    return require_success(current)
            except (ConnectionFailed, ApiError) as error:
                await asyncio.sleep(patience.pause(error))

    async def _follow(self, build: str, seen: Events) -> AsyncIterator[BuildEvent]:
        seen.begin()
        async with self._client.open(events(build)) as response:
            with http_errors():
                async for chunk in response.aiter_bytes():
                    for event in seen.feed(chunk):
                        yield event
        seen.finish()


class _ReportingFile(io.BytesIO):
    """A file in memory that reports how much of it has been read."""

    def __init__(self, content: bytes, sent: Sent) -> None:
        super().__init__(content)
        self._sent, self._size = sent, len(content)

    def read(self, size: int | None = -1) -> bytes:
        piece = super().read(size)
        self._sent(self.tell(), self._size)
        return piece


def _opener(data: Data, sent: Sent | None) -> Callable[[], tuple[str, IO[bytes]]]:
    """A function that opens the data, which is read once, for each attempt."""
    if isinstance(data, str | os.PathLike):
        name, content = Path(data).name, Path(data).read_bytes()
    else:
        name, content = "examples.jsonl", _lines(data)
    return lambda: (name, _ReportingFile(content, sent) if sent else io.BytesIO(content))


def _lines(objects: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in objects).encode()


def _format(value: Any) -> str:
    """A value as a form field."""
    return json.dumps(value) if isinstance(value, bool) else str(value)
