"""Authentication by API key, and authorisation by scope and persona."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from masquerade.errors import (
    InvalidKey,
    MasqueradeError,
    NotReady,
    OriginForbidden,
    Overloaded,
    RateLimited,
)
from masquerade.http import errors
from masquerade.http.bodies import read_body
from masquerade.http.internal import PRIORITY, SENDER, InternalSender
from masquerade.http.limits import Policy, is_loopback
from masquerade.http.request_log import RequestRecord
from masquerade.keys import Key, Rates
from masquerade.keys import Scope as KeyScope
from masquerade.keys.ring import Keyring
from masquerade.service.rights import LOCAL, Rights, find_rights
from masquerade.service.serving import PersonaReference

TARGET_LIMIT = 128  # characters of a name in the audit log; that of a persona has fewer
MOST_HASHING = 16  # tokens that may wait for scrypt
# Routes that need no key: they show nothing of any key and change nothing.
OPEN = frozenset({"/", "/healthz", "/readyz", "/health", "/ping", "/version", "/docs", "/openapi.json"})
OPEN_FOLDER = "/web/"  # the playground's files


@dataclass(frozen=True)
class Caller(Rights):
    """The sender of a request: its rights, and the record of the request."""

    record: RequestRecord
    answer_seconds: float  # limit for all answers to the request
    keyring: Keyring
    priority: int = 0  # of its requests to the engine

    @property
    def share(self) -> str:
        """Whose fair share of engine and workers its requests count towards: work in the background has its own."""
        return f"{self.owner} in the background" if self.priority < 0 else self.owner

    @property
    def owner(self) -> str:
        """The id of the key: the owner of files, jobs and responses."""
        return self.key.id if self.key else LOCAL

    def key_error(self) -> MasqueradeError | None:
        """The error if the key has been revoked or has expired since the request began. Cheap enough for every step."""
        if self.key is not None:
            with suppress(NotReady):  # the table cannot be read now
                try:
                    self.keyring.check(self.key.id)
                except InvalidKey as error:
                    return error
        return None

    def check_persona(self, reference: str, param: str | None = None) -> None:
        """As `Rights` does; a permitted name becomes a target of the request in the audit log."""
        super().check_persona(reference, param)
        self.record.targets.append(reference.partition("@")[0][:TARGET_LIMIT])

    def check_reference(self, reference: PersonaReference | None) -> None:
        """`check_persona` for the persona that a request names; every caller may use the base."""
        if reference is not None:
            self.check_persona(reference.name, reference.field)


class Needs:
    """A dependency on a scope, whose value is the caller. Raises `ScopeMissing`."""

    def __init__(self, scope: KeyScope) -> None:
        self.scope = scope

    async def __call__(self, http: Request) -> Caller:
        """The caller, if its key has the scope."""
        caller: Caller = http.state.caller
        caller.record.scope = self.scope
        caller.check_scope(self.scope)
        return caller


class ScopedRoute(APIRoute):
    """Checks the scope before it reads the body, so that errors of the body reach permitted callers only. Reads JSON
    within the limits of `bodies`.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Any]]:  # type: ignore[override]
        """The framework's handler, after the scope and the body."""
        handle = super().get_route_handler()
        needs = next((one.call for one in self.dependant.dependencies if isinstance(one.call, Needs)), None)

        async def check_and_handle(http: Request) -> Any:
            if needs is not None:
                await needs(http)
            return await handle(await read_body(http))

        return check_and_handle


Measuring = Annotated[Caller, Depends(Needs("metrics"))]
Chatting = Annotated[Caller, Depends(Needs("chat"))]
Building = Annotated[Caller, Depends(Needs("build"))]
Managing = Annotated[Caller, Depends(Needs("admin"))]


class AuthMiddleware:
    """Once the store has keys, requires a valid one before the body is read, except for the paths in `OPEN`.

    Without keys every client may use the server, except browsers for pages of other origins: `Origin` shows those, and
    after DNS rebinding to loopback `Host` does.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, rates: Rates, policy: Policy) -> None:
        self._app = app
        self._keyring = keyring
        self._rates = rates
        self._policy = policy
        self._scrypt_thread = ThreadPoolExecutor(1, "keys")  # scrypt gets one core at most
        self._hashing_count = 0  # tokens that wait for scrypt or run it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        key: Key | None = None
        sender: InternalSender | None = scope["state"].get(SENDER)
        record.background = sender is not None
        try:
            if sender is not None:
                key = record.key = find_rights(sender.owner, self._keyring).key
                if key:
                    self._rates.admit(key, background=True)
            elif len(self._keyring):
                key = await self._find(Headers(scope=scope))
                record.key = key
                self._rates.admit(key)
            else:
                self._check_origin(Headers(scope=scope))
        except MasqueradeError as error:
            if isinstance(error, InvalidKey):  # slows down guessing; other requests do not wait
                await asyncio.sleep(self._policy.wrong_key_seconds)
            if isinstance(error, RateLimited):
                record.limited = error.kind
            headers = self._rates.headers(key) if key else None
            await errors.respond(error, headers)(scope, receive, send)
            return
        seconds, priority = (sender.answer_seconds, PRIORITY) if sender else (self._policy.answer_seconds, 0)
        scope["state"]["caller"] = Caller(key, record, seconds, self._keyring, priority)
        try:
            await self._app(scope, receive, self._add_limits(key, send) if key else send)
        finally:
            if key:
                self._rates.charge(key, record.tokens)

    async def _find(self, headers: Headers) -> Key:
        """The key in the headers."""
        tokens = set(_read_tokens(headers))
        if not tokens:
            raise InvalidKey("no API key was given; send the header `Authorization: Bearer KEY` or `x-api-key: KEY`")
        if len(tokens) > 1:
            raise InvalidKey("the headers `Authorization` and `x-api-key` hold different API keys; send one key")
        (token,) = tokens
        key = self._keyring.find(token)
        return key or await self._find_scrypt(token)

    async def _find_scrypt(self, token: str) -> Key:
        """The key of a token whose hash is still scrypt's. Raises `Overloaded` if too many wait for that."""
        if self._hashing_count >= MOST_HASHING:
            raise Overloaded(f"{self._hashing_count} keys of an older version are being checked, which is the limit")
        self._hashing_count += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._scrypt_thread, self._keyring.find_scrypt, token)
        finally:
            self._hashing_count -= 1

    def _add_limits(self, key: Key, send: Send) -> Send:
        """A `send` that adds the headers of the key's limits to the response."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._rates.headers(key))
            await send(message)

        return send_with_limits if key.rpm or key.tpm else send

    def _check_origin(self, headers: Headers) -> None:
        """Raises `OriginForbidden` for a browser that acts for a page of another origin."""
        host, origin = headers.get("host"), headers.get("origin")
        if self._policy.loopback and host is not None and not is_loopback(_hostname(host)):
            raise OriginForbidden(f"the server is local and has no keys, but the header Host says {host!r:.80}")
        if origin is None or origin in self._policy.cors_origins or "*" in self._policy.cors_origins:
            return
        if _host(origin) != host:
            raise OriginForbidden(
                f"pages of {origin!r:.80} may not use this server; `--cors-origin` allows it, and so do keys"
            )


def _read_tokens(headers: Headers) -> Iterator[str]:
    """The API keys in `Authorization`, as OpenAI's clients send them, and in `x-api-key`, as Anthropic's do."""
    for value in headers.getlist("authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            yield token.strip()
    yield from (token.strip() for token in headers.getlist("x-api-key") if token.strip())


def _host(origin: str) -> str:
    """The name and the port in an Origin header; empty if it has none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
