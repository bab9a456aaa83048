"""Requests that the server sends to its own application, in the name of a key and in the background."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message

SENDER = "sender"  # in the `state` of the scope, which no client can set
PRIORITY = -1  # of the engine's requests: background


@dataclass(frozen=True)
class InternalSender:
    """In whose name a request is sent, and how many seconds its answer may take."""

    owner: str  # the id of a key, or `LOCAL`
    answer_seconds: float


@dataclass(frozen=True)
class InternalResponse:
    """The response to an internal request."""

    status: int
    headers: Headers
    body: str


async def post(app: ASGIApp, sender: InternalSender, path: str, content: bytes) -> InternalResponse:
    """Send JSON to a route, through every layer that a client's request passes but the check of a token.

    Cancelling the call is like a disconnect of a client.
    """
    start: Message = {}
    body = bytearray()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # nobody disconnects
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            body.extend(message.get("body", b""))

    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": Headers(headers).raw,
        "client": None,
        "server": None,
        "state": {SENDER: sender},
    }
    await app(scope, receive, send)
    return InternalResponse(start["status"], Headers(raw=start["headers"]), body.decode())
