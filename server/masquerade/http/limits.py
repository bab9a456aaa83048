"""Limits of requests: size, speed and origin."""

from __future__ import annotations

import asyncio
import ipaddress
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
from masquerade.http.bodies import is_json

# Requests with files; their routes have limits of their own. JSON has the limit of all others.
_UPLOADS = re.compile(r"POST /v1/(files|personas)|PUT /v1/personas/[^/]+/content")
_KINDS = ("requests", "tokens")
_WHOLE_BODY = 10  # times `body_seconds` is the limit for a whole body; uploads get more by their size
LINGER_SECONDS, LINGER_BYTES = 5.0, 2**26  # limits for discarding the rest of a refused body
EXPOSED = (
    *("ETag", "Retry-After", "X-Persona-Generation", "x-request-id"),
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in _KINDS),
)


@dataclass(frozen=True)
class Policy:
    """The limits and options of a server."""

    loopback: bool = True  # whether the server listens on loopback only
    cors_origins: tuple[str, ...] = ()  # origins of pages that may use it, such as https://chat.example
    body_bytes: int = 2**23  # except for uploads
    header_bytes: int = 2**15
    headers: int = 100
    body_seconds: float = 30.0  # without a byte of a body
    upload_rate: float = 2**15  # bytes a second that extend the time for an upload
    wrong_key_seconds: float = 0.0  # delay of the error for an invalid key
    answer_seconds: float = 600.0  # for all answers to a request
    response_days: float = 30.0  # for which responses are stored; 0 stores none
    gateway_metrics: bool = False  # whether there is what `gateway.py` serves


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class LimitsMiddleware:
    """Refuses requests that are too large or too slow, before and while it reads them."""

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = _LingeringConnection(receive, send)
        receive, send = connection.receive, connection.send
        limit = None if _is_upload(scope) else self._policy.body_bytes
        try:
            self._check(scope, limit)
        except MasqueradeError as error:
            await errors.respond(error)(scope, receive, send)
            return
        body = _Body(receive, send, limit, self._policy)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.error is None:
                raise
        if body.error is not None and not body.response_started:
            await errors.respond(body.error)(scope, receive, send)

    def _check(self, scope: Scope, limit: int | None) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._policy.headers or size > self._policy.header_bytes:
            raise HeadersTooLarge(
                f"the request has {len(headers)} headers of {size} bytes; the limits are {self._policy.headers} and "
                f"{self._policy.header_bytes}"
            )
        declared = Headers(scope=scope).get("content-length", "0")
        if limit is not None and declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)


class _LingeringConnection:
    """Discards the rest of a body before the connection closes. A client that still sends would lose the response."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._has_more = True
        self._closing = False
        self._received = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._has_more = message.get("more_body", False)
        self._received += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._closing = Headers(raw=message["headers"]).get("connection") == "close"
        elif self._closing and self._has_more and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._drain(), LINGER_SECONDS)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        limit = self._received + LINGER_BYTES
        while self._has_more and self._received < limit:
            await self.receive()


class _Body:
    """The body of a request within its limits. The error of a body over a limit replaces the response of the
    application to a body that ends early.
    """

    def __init__(self, receive: Receive, send: Send, limit: int | None, policy: Policy) -> None:
        self._receive, self._send = receive, send
        self._limit, self._seconds = limit, policy.body_seconds
        self._rate = policy.upload_rate if limit is None else math.inf
        self._received = 0
        self._began: float | None = None
        self._complete = False
        self.response_started = False
        self.error: MasqueradeError | None = None

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        allowed = _WHOLE_BODY * self._seconds + self._received / self._rate
        try:
            async with asyncio.timeout_at(min(now + self._seconds, self._began + allowed)):
                message = await self._receive()
        except TimeoutError:
            self.error = TimedOut(
                f"the body stopped for {self._seconds:g} s, or took longer than {allowed:.0f} s; "
                f"{self._received} bytes have arrived"
            )
            raise self.error from None
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._limit is not None and self._received > self._limit:
            self.error = _too_large(self._limit)
            raise self.error
        return message

    async def send(self, message: Message) -> None:
        if self.error is not None and not self.response_started:
            return
        self.response_started = True
        await self._send(message)


class CorsMiddleware(CORSMiddleware):
    """CORS with errors in the server's own form."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The response to a preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return errors.respond(OriginForbidden("pages of this origin may not send this request"))


class Protocol(H11Protocol):
    """HTTP/1.1 with errors in the server's own form and a limit on the time for a head."""

    head_seconds = 30.0  # from the start of a connection, or the first byte of a later request
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time for the first head."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.head_seconds, self._expire)

    def data_received(self, data: bytes) -> None:
        """Only a complete head stops the clock."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._expire)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._cancel_deadline()
        super().connection_lost(exc)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE:
            self._refuse(TimedOut(f"the head of the request did not arrive within {self.head_seconds:g} s"))

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that are not HTTP, or to a head that h11 finds too large, and close."""
        self._refuse(BadRequest(msg))

    def _refuse(self, error: BadRequest) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response has begun
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


def _is_upload(scope: Scope) -> bool:
    uploads = _UPLOADS.fullmatch(f"{scope['method']} {scope['path']}") is not None
    return uploads and not is_json(Headers(scope=scope).get("content-type", ""))


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit} bytes, which is the limit")
