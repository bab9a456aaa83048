"""The ingress: an ASGI application that passes requests on to replicas, and their responses back."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from masquerade.cluster import metrics
from masquerade.cluster.router import Affinity
from masquerade.errors import MasqueradeError, NotReady, Overloaded
from masquerade.http import errors
from masquerade.http.gateway import OPERATIONS
from masquerade.http.limits import LimitsMiddleware, Policy

_log = logging.getLogger(__name__)
READINESS = {"/readyz", "/health", "/ping"}  # others wait for a replica
METRICS, SUMMED = "/metrics", "/metrics/sum"
METRICS_SECONDS = 10.0  # for all replicas to say their metrics
BEGIN_SECONDS = 60.0  # for a replica to be found, while the last one is replaced
READ_BYTES = 2**18  # of a body that is searched for its persona; a larger one goes to any replica
# Routes that answer only on a replica that runs the store's jobs.
JOBS = re.compile(r"POST /v1/personas|\w+ /v1/(files|fine_tuning|batches)(/.*)?")
_PASSED = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path"),
    *("query_string", "headers", "client", "server"),
)


class Ingress:
    """Passes requests on to the replicas behind a handle, within the limits of a policy for their bodies."""

    def __init__(self, handle: DeploymentHandle[Any], policy: Policy) -> None:
        self._replicas = handle
        self._respond = handle.options(method_name="respond", stream=True)
        self._app = LimitsMiddleware(self._serve, policy)
        self._seconds = policy.answer_seconds + BEGIN_SECONDS  # for the first message of a response
        self._draining = False
        self._open = 0
        self._idle = threading.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the start and end of the application, at which there is nothing to do."""
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
        elif scope["type"] == "http":
            with self._counted():
                await self._app(scope, receive, send)

    def drain(self, grace: float) -> None:
        """Refuse new requests and wait until the others have ended, but at most `grace` seconds."""
        with self._idle:
            self._draining = True
            self._idle.wait_for(lambda: self._open == 0, grace)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._idle:
            self._open += 1
        try:
            yield
        finally:
            with self._idle:
                self._open -= 1
                self._idle.notify_all()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/healthz":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif self._draining:
            await errors.respond(NotReady("the server is stopping"))(scope, receive, send)
        elif scope["path"] in READINESS and not self._replicas.running_replicas_populated():
            await errors.respond(NotReady("no replica is running"))(scope, receive, send)
        elif scope["path"] in (METRICS, SUMMED):
            await (await self._measure(scope))(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        response = self._respond.remote(find_affinity(scope, body), _slim(scope), body)
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        answered = complete = False
        try:
            while (messages := await _next(response, gone, None if answered else self._seconds)) is not None:
                for message in messages:
                    answered = True
                    await send(message)
            complete = not gone.done()
        except (RayError, RayServeException, TimeoutError) as error:
            _log.warning("no replica answered %s %s: %s", scope["method"], scope["path"], _shorten(error))
            if not answered:  # else the connection closes, and the client sees that the response is incomplete
                await errors.respond(_translate(error))(scope, receive, send)
        finally:
            gone.cancel()
            if not complete:
                await asyncio.to_thread(response.cancel)

    async def _measure(self, scope: Scope) -> Response:
        """The replicas' metrics, or the refusal of one of them."""
        slim = {**_slim(scope), "path": METRICS, "raw_path": METRICS.encode()}
        call = self._replicas.broadcast("fetch", slim)
        try:
            results = await call.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        except TimeoutError as error:
            return errors.respond(_translate(error))
        texts = {}
        for result in results:
            if isinstance(result, BaseException):
                _log.warning("a replica has no metrics: %s", _shorten(result))
                continue
            replica, status, headers, content = result
            if status != 200:
                response = Response(content, status)
                response.raw_headers = headers
                return response
            texts[replica] = content.decode()
        merge = metrics.add if scope["path"] == SUMMED else metrics.label
        return Response(await asyncio.to_thread(merge, texts), media_type="text/plain; version=0.0.4; charset=utf-8")


def find_affinity(scope: Scope, body: bytes) -> Affinity:
    """What the router needs to know of a request. Replicas refuse bodies that are not what they should be."""
    if JOBS.fullmatch(f"{scope['method']} {scope['path']}"):
        return Affinity(needs_jobs=True)
    if scope["path"] not in OPERATIONS:
        return Affinity()
    named = Headers(scope=scope).get("x-persona")
    if len(body) <= READ_BYTES:
        with suppress(ValueError, RecursionError):
            found = json.loads(body)
            if isinstance(found, dict):
                _, colon, suffix = str(found.get("model")).rpartition(":")
                named = (suffix if colon else None) or found.get("persona") or named
    return Affinity(str(named).partition("@")[0] if named else None)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(response: Any, gone: asyncio.Future[None], seconds: float | None) -> list[Message] | None:
    """The next messages of a response; None after the last ones, or when the client has gone. Raises `TimeoutError`."""
    coming = asyncio.ensure_future(anext(response, None))
    await asyncio.wait({coming, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if not coming.done():
        coming.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # the call is cancelled next
        if gone.done():
            return None
        raise TimeoutError(f"no answer has begun for {seconds:.0f} s")
    messages: list[Message] | None = await coming
    return messages


def _slim(scope: Scope) -> Scope:
    """The part of a scope that can be sent to another process. The request's id goes as a header."""
    slim = {name: scope[name] for name in _PASSED if name in scope}
    if request_id := scope.get("state", {}).get("request_id"):
        others = [(name, value) for name, value in slim["headers"] if name != b"x-request-id"]
        slim["headers"] = [*others, (b"x-request-id", request_id.encode())]
    return slim


def _translate(error: Exception) -> MasqueradeError:
    if isinstance(error, BackPressureError):
        return Overloaded("every replica and its queue are full; try again later")
    if isinstance(error, TimeoutError):
        return NotReady("no replica answered in time; send the request again")
    return NotReady("the replica stopped before it answered; send the request again")


def _shorten(error: BaseException) -> str:
    """The last line of an error, where Ray says what happened."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
