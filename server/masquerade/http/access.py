"""Who asks, and whether they may.

Knows tokens in headers, scopes of routes and lists of personas. Refuses to know how a key is kept.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
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
from masquerade.http.limits import Policy
from masquerade.http.request_log import RequestRecord
from masquerade.keys import Key, Keyring, Rates
from masquerade.keys import Scope as KeyScope
from masquerade.service.rights import LOCAL, Rights

HASHED = 16  # tokens that may wait for scrypt
# Open to whoever reaches the server: they hold nothing of any key's, and change nothing.
OPEN = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})
OPEN_FOLDER = "/web/"  # the playground's files


@dataclass(frozen=True)
class Caller(Rights):
    """Whoever sent a request, what they may do, and the entry about the request."""

    entry: RequestRecord
    seconds: float  # that answers to it may take
    keyring: Keyring

    @property
    def owner(self) -> str:
        """Whom files, jobs and the engine's work belong to: the id of the key."""
        return self.key.id if self.key else LOCAL

    def problem(self) -> MasqueradeError | None:
        """What has become of the key since it was let in; costs next to nothing, so that streams can ask often."""
        if self.key is not None:
            with suppress(NotReady):  # the table cannot be read now: nothing is known
                try:
                    self.keyring.check(self.key.id)
                except InvalidKey as error:
                    return error
        return None

    def check_persona(self, reference: str, param: str | None = None) -> None:
        """As `Rights` does; a name that passes is a target of the request, for the audit log."""
        super().check_persona(reference, param)
        self.entry.targets.append(reference.partition("@")[0])

    def check_choice(self, choice: tuple[str, str] | None) -> None:
        """The same for what a request chose, with the field that named it; the bare base is everybody's."""
        if choice is not None:
            self.check_persona(*choice)


class Needs:
    """A route's scope, as a dependency that gives the caller. Raises `ScopeMissing`."""

    def __init__(self, scope: KeyScope) -> None:
        self.scope = scope

    async def __call__(self, http: Request) -> Caller:
        """The caller, if its key has the scope."""
        caller: Caller = http.state.caller
        caller.entry.scope = self.scope
        caller.check_scope(self.scope)
        return caller


class ScopedRoute(APIRoute):
    """Asks for the scope before the body is read: who may not ask hears that, whatever is wrong with the body. Reads
    JSON within the bounds of `bodies`.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Any]]:  # type: ignore[override]
        """The framework's, and the question before it."""
        handle = super().get_route_handler()
        needs = next((one.call for one in self.dependant.dependencies if isinstance(one.call, Needs)), None)

        async def ask_first(http: Request) -> Any:
            if needs is not None:
                await needs(http)
            return await handle(await read_body(http))

        return ask_first


Measuring = Annotated[Caller, Depends(Needs("metrics"))]
Chatting = Annotated[Caller, Depends(Needs("chat"))]
Building = Annotated[Caller, Depends(Needs("build"))]
Managing = Annotated[Caller, Depends(Needs("admin"))]


class AuthMiddleware:
    """Lets nobody without a valid key in once the store has keys, before a body is read; only what is `OPEN` is open.

    Before that, whoever reaches the server may use it, except browsers on behalf of pages from elsewhere: their
    `Origin` is another, and the `Host` of a page whose name was bound to loopback is no name of loopback.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, rates: Rates, policy: Policy) -> None:
        self._app = app
        self._keyring = keyring
        self._rates = rates
        self._loopback = policy.loopback
        self._seconds = policy.answer_seconds
        self._wrong_key_seconds = policy.wrong_key_seconds
        self._origins = frozenset(policy.cors_origins)
        self._hashing = ThreadPoolExecutor(1, "keys")  # scrypt gets one core at most, and nobody else waits for it
        self._hashed = 0  # tokens that wait for it or are at it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        entry: RequestRecord = scope["state"]["entry"]
        key: Key | None = None
        try:
            if len(self._keyring):
                key = await self._find(Headers(scope=scope).get("authorization", ""))
                entry.key = key
                self._rates.admit(key)
            else:
                self._check_page(Headers(scope=scope))
        except MasqueradeError as error:
            if isinstance(error, InvalidKey):  # slows down a client that guesses, and takes nothing from the others
                await asyncio.sleep(self._wrong_key_seconds)
            if isinstance(error, RateLimited):
                entry.limited = error.kind
            headers = self._rates.headers(key) if key else None
            await errors.respond(error, headers)(scope, receive, send)
            return
        scope["state"]["caller"] = Caller(key, entry, self._seconds, self._keyring)
        try:
            await self._app(scope, receive, self._telling(key, send) if key else send)
        finally:
            if key:
                self._rates.charge(key, entry.tokens)

    async def _find(self, authorization: str) -> Key:
        """The key of a header."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise InvalidKey("no API key was given; send the header `Authorization: Bearer KEY`")
        token = token.strip()
        key = self._keyring.find(token)
        return key or await self._find_scrypt(token)

    async def _find_scrypt(self, token: str) -> Key:
        """The key of a token whose hash is still scrypt's. Raises `Overloaded` if too many wait for that."""
        if self._hashed >= HASHED:
            raise Overloaded(f"{self._hashed} keys of an older version are being checked, which is the limit")
        self._hashed += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._hashing, self._keyring.find_scrypt, token)
        finally:
            self._hashed -= 1

    def _telling(self, key: Key, send: Send) -> Send:
        """Adds what is left of the key's limits to the answer."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._rates.headers(key))
            await send(message)

        return send_with_limits if key.rpm or key.tpm else send

    def _check_page(self, headers: Headers) -> None:
        host, origin = headers.get("host"), headers.get("origin")
        if self._loopback and host is not None and not is_loopback(_name(host)):
            raise OriginForbidden(f"the server is local and has no keys, but the header Host says {host!r:.80}")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if urlsplit(origin).netloc != host:
            raise OriginForbidden(
                f"pages of {origin!r:.80} may not use this server; `--cors-origin` allows it, and so do keys"
            )


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
