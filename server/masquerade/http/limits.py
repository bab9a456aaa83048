"""What a request may be, whoever sends it: how large, how slow, from which pages."""

from __future__ import annotations

import asyncio
import json
import math
import re
import uuid
from contextlib import suppress
from dataclasses import dataclass

import h11
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from masquerade.errors import BadRequest, HeadersTooLarge, MasqueradeError, OriginForbidden, TimedOut, TooLarge
from masquerade.http import errors

# Routes that take files; each has a limit of its own.
_UPLOADS = re.compile(r"/v1/(files|personas|personas/[^/]+/content)")
_KINDS = ("requests", "tokens")
_PATIENCE = 10  # times as long as one wait for a byte may a whole body take; a file gets more by its size
LINGER_SECONDS, LINGER_BYTES = 5.0, 2**26  # for and up to which what is too much is read and thrown away
EXPOSED = (
    *("ETag", "Retry-After", "X-Persona-Generation", "x-request-id"),
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in _KINDS),
)


@dataclass(frozen=True)
class Policy:
    """What a server allows."""

    loopback: bool = True  # it listens on loopback only
    cors_origins: tuple[str, ...] = ()  # whose pages may use it, such as https://chat.example
    body_bytes: int = 2**23  # of a body that is no file
    header_bytes: int = 2**15
    headers: int = 100
    body_seconds: float = 30.0  # without a byte of a body
    upload_rate: float = 2**15  # bytes a second that a file must arrive with, after what every body gets
    wrong_key_seconds: float = 0.0  # before a request without a valid key is refused
    answer_seconds: float = 600.0  # for all answers to a request


class LimitsMiddleware:
    """Refuses what is too large or too slow, before and while it is read."""

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line = _Line(receive, send)
        receive, send = line.receive, line.send
        limit = None if _UPLOADS.fullmatch(scope["path"]) else self._policy.body_bytes
        try:
            self._check(scope, limit)
        except MasqueradeError as error:
            await errors.respond(error)(scope, receive, send)
            return
        body = _Body(receive, send, limit, self._policy)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None and not body.answered:
            await errors.respond(body.refusal)(scope, receive, send)

    def _check(self, scope: Scope, limit: int | None) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._policy.headers or size > self._policy.header_bytes:
            raise HeadersTooLarge(
                f"the request has {len(headers)} headers of {size} bytes; the limits are {self._policy.headers} and "
                f"{self._policy.header_bytes}"
            )
        declared = Headers(scope=scope).get("content-length", "0")
        if limit is not None and declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)


class _Line:
    """A connection that is not closed while the client still sends: what it has not read yet would be lost with it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._more = True
        self._closing = False
        self._received = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._more = message.get("more_body", False)
        self._received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._closing = Headers(raw=message["headers"]).get("connection") == "close"
        elif self._closing and self._more and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drain(), LINGER_SECONDS)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        enough = self._received + LINGER_BYTES
        while self._more and self._received < enough:
            await self.receive()


class _Body:
    """The body of a request on its way in. What is wrong with it is answered in place of whatever the application
    makes of a body that ends early.
    """

    def __init__(self, receive: Receive, send: Send, limit: int | None, policy: Policy) -> None:
        self._receive, self._send = receive, send
        self._limit, self._seconds = limit, policy.body_seconds
        self._rate = policy.upload_rate if limit is None else math.inf
        self._received = 0
        self._began: float | None = None
        self._whole = False
        self.answered = False
        self.refusal: MasqueradeError | None = None

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        patience = _PATIENCE * self._seconds + self._received / self._rate
        try:
            async with asyncio.timeout_at(min(now + self._seconds, self._began + patience)):
                message = await self._receive()
        except TimeoutError:
            self.refusal = TimedOut(
                f"nothing of the body arrived for {self._seconds:g} s, or not all of it within {patience:.0f} s: "
                f"{self._received} bytes did"
            )
            raise self.refusal from None
        self._received += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._limit is not None and self._received > self._limit:
            self.refusal = _too_large(self._limit)
            raise self.refusal
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is not None and not self.answered:
            return
        self.answered = True
        await self._send(message)


class CorsMiddleware(CORSMiddleware):
    """CORS, whose refusals are like all others."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """What a browser hears before it asks."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        return errors.respond(OriginForbidden("pages of this origin may not use this server in this way"))


class Protocol(H11Protocol):
    """HTTP/1.1, whose refusal of what is no HTTP is like all others, and which does not wait for a head for ever."""

    head_seconds = 30.0  # from the first moment of a connection, or the first byte of a later request
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there, and has so long to say what is wanted."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.head_seconds, self._hang_up)

    def data_received(self, data: bytes) -> None:
        """Bytes: none but those that complete a head buy more time."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """They left."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE:
            self._refuse(TimedOut(f"the head of the request did not arrive within {self.head_seconds:g} s"))

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, or has far too many headers, and hang up."""
        self._refuse(BadRequest(msg))

    def _refuse(self, error: BadRequest) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # it has had its answer, or is having it
            self.transport.close()
            return
        content = json.dumps(errors.body(error)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("x-request-id", uuid.uuid4().hex),
            ("connection", "close"),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes, which is the limit")
