"""Every test of the client runs twice: once with `Client`, once with `AsyncClient` driven to look the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from masquerade_client import AsyncClient, AsyncStream, Client, Model, Reply, Stream
from tests.client.scripted import Script, scripted


class Driver(Protocol):
    """One way to use the package. `stop_after` leaves a stream after so many pieces."""

    def chat(self, prompt: Any, **options: Any) -> Reply: ...
    def stream(
        self, prompt: Any, *, stop_after: int | None = None, into: list[str] | None = None
    ) -> Stream | AsyncStream: ...
    def models(self) -> list[Model]: ...
    def ready(self) -> bool: ...


class Sync:
    def __init__(self, **settings: Any) -> None:
        self.settings = {"retries": 0} | settings

    def chat(self, prompt: Any, **options: Any) -> Reply:
        with Client(**self.settings) as client:
            return client.chat(prompt, **options)

    def stream(self, prompt: Any, *, stop_after: int | None = None, into: list[str] | None = None) -> Stream:
        into = [] if into is None else into
        with Client(**self.settings) as client, client.stream(prompt) as stream:
            for piece in stream:
                into.append(piece.text)
                if len(into) == stop_after:
                    break
        return stream

    def models(self) -> list[Model]:
        with Client(**self.settings) as client:
            return client.models()

    def ready(self) -> bool:
        with Client(**self.settings) as client:
            return client.ready()


class Async:
    def __init__(self, **settings: Any) -> None:
        self.settings = {"retries": 0} | settings

    def chat(self, prompt: Any, **options: Any) -> Reply:
        async def run() -> Reply:
            async with AsyncClient(**self.settings) as client:
                return await client.chat(prompt, **options)

        return asyncio.run(run())

    def stream(self, prompt: Any, *, stop_after: int | None = None, into: list[str] | None = None) -> AsyncStream:
        pieces = [] if into is None else into

        async def run() -> AsyncStream:
            async with AsyncClient(**self.settings) as client, client.stream(prompt) as stream:
                async for piece in stream:
                    pieces.append(piece.text)
                    if len(pieces) == stop_after:
                        break
            return stream

        return asyncio.run(run())

    def models(self) -> list[Model]:
        async def run() -> list[Model]:
            async with AsyncClient(**self.settings) as client:
                return await client.models()

        return asyncio.run(run())

    def ready(self) -> bool:
        async def run() -> bool:
            async with AsyncClient(**self.settings) as client:
                return await client.ready()

        return asyncio.run(run())


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as running:
        yield running


@pytest.fixture(params=[Sync, Async])
def kind(request: pytest.FixtureRequest) -> type[Sync] | type[Async]:
    chosen: type[Sync] | type[Async] = request.param
    return chosen


@pytest.fixture
def client(kind: type[Sync] | type[Async], script: Script) -> Driver:
    return kind(base_url=script.base_url)


@pytest.fixture
def nowhere() -> str:
    """A URL on which nobody listens."""
    with scripted() as gone:
        return gone.base_url
