"""A replica: the whole HTTP application with an engine of its own, in a Ray actor, which gets requests as messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.types import Message, Scope

from masquerade.app import RequestIdMiddleware
from masquerade.cluster.router import Affinity
from masquerade.http.gateway import list_residents
from masquerade.service.serving import Serving

WAITING_MESSAGES = 64  # of a response that its reader has not taken yet; then the application waits


class Replica:
    """Answers what an ingress passes on. `make_app` loads the model and makes the application; it runs here."""

    async def __init__(self, make_app: Callable[[], RequestIdMiddleware[FastAPI]]) -> None:  # type: ignore[misc]
        self._app = await asyncio.to_thread(make_app)
        self._lifespan = self._app.app.router.lifespan_context(self._app.app)
        await self._lifespan.__aenter__()
        self._serving: Serving = self._app.app.state.serving

    async def __del__(self) -> None:
        """End the application. Ray Serve calls and awaits this once, after the last response."""
        await self._lifespan.__aexit__(None, None, None)

    async def respond(self, affinity: Affinity, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:  # noqa: ARG002
        """Run the application; yields the messages of its response, those that are ready together.

        The router reads the `affinity`. Cancelling the call is a disconnect of the client.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue(WAITING_MESSAGES)
        gone = asyncio.Event()
        running = asyncio.create_task(self._run(scope, body, messages, gone))
        complete = False
        try:
            while not complete:
                ready = await _take(messages)
                complete = ready[-1] is None
                yield [message for message in ready if message is not None]
        finally:
            gone.set()
            while not complete:  # the application may be waiting to put a message
                complete = (await _take(messages))[-1] is None
        await running

    async def fetch(self, scope: Scope) -> tuple[str, int, list[tuple[bytes, bytes]], bytes]:
        """The response to a request without a body: this replica's name, the status, the headers and the body."""
        parts = [message async for ready in self.respond(Affinity(), scope, b"") for message in ready]
        content = b"".join(message.get("body", b"") for message in parts[1:])
        return serve.get_replica_context().replica_tag, parts[0]["status"], parts[0]["headers"], content

    async def check_health(self) -> None:
        """Raises if the engine's watchdog finds it dead or stuck; Ray Serve then replaces the replica."""
        if (reason := self._serving.engine.failure) is not None:
            raise RuntimeError(reason)

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router is told of this replica, once a second."""
        resident, _ = await asyncio.to_thread(list_residents, self._serving)
        return {"personas": resident, "runs_jobs": self._app.app.state.job_service is not None}

    async def _run(
        self, scope: Scope, body: bytes, messages: asyncio.Queue[Message | None], gone: asyncio.Event
    ) -> None:
        """Put the messages of the response in a queue, and None after the last one."""
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        try:
            await self._app({**scope, "state": {}}, receive, messages.put)
        finally:
            await messages.put(None)


async def _take(messages: asyncio.Queue[Message | None]) -> list[Message | None]:
    """Wait for a message, and take all that are there."""
    ready = [await messages.get()]
    while not messages.empty():
        ready.append(messages.get_nowait())
    return ready
