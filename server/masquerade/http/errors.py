"""Renders every exception as OpenAI's error body, or Anthropic's on its routes, without stack traces and paths."""

from __future__ import annotations

import errno
import json
import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import maskstore
from maskstore import MaskError
from masquerade.errors import (
    GIVEN,
    BadRequest,
    ContextTooLong,
    InvalidValue,
    MasqueradeError,
    MethodNotAllowed,
    NotFound,
    NotReady,
    Overloaded,
    PersonaDamaged,
    PersonaExists,
    PersonaNotFound,
    RevisionConflict,
    StorageFull,
    TimedOut,
    TooLarge,
    UnsupportedParameter,
    UnusableStore,
    quote,
)
from masquerade.http.wire import Refusal, show

_log = logging.getLogger(__name__)

ANTHROPIC = "/v1/messages"  # Anthropic's routes are this path and the paths below it

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_SQLITE_UNUSABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_SQLITE_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FAILED = "the server failed; its log says why"
MESSAGE_LIMIT = 1000  # characters
_LONG_WORD = re.compile(rf"(\S{{{GIVEN - 3}}})\S{{4,}}")  # only values of clients are that long
_UNION_MEMBERS = ("str", "list", "float", "int", "dict")
_SHOULD = "Input should be "
_KINDS = {"dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object"}

_MASK_ERRORS: Mapping[type, type[MasqueradeError]] = {
    maskstore.InvalidName: InvalidValue,
    maskstore.InvalidMaskValue: InvalidValue,
    maskstore.MaskNotFound: PersonaNotFound,
    maskstore.MaskExists: PersonaExists,
    maskstore.MaskConflict: RevisionConflict,
    maskstore.StoreBusy: NotReady,
    maskstore.BucketUnreachable: NotReady,
    MaskError: PersonaDamaged,
}


class Fault(BaseModel):
    """One error: `code` is for programs, `message` for people; `param` is the field at fault, if there is one."""

    message: str
    type: str
    param: str | None
    code: str


class Body(BaseModel):
    """The body of every error."""

    model_config = show(
        {
            "error": {
                "message": "there is no file 'file-none'",
                "type": "not_found_error",
                "param": "training_file",
                "code": "file_not_found",
            }
        }
    )

    error: Fault


class AnthropicDetails(BaseModel):
    """What Anthropic's own body does not have: the code and the field of OpenAI's."""

    error_code: str
    param: str | None


class AnthropicFault(BaseModel):
    """One error; Anthropic's clients show `message`, and `error_code` of the details."""

    type: str
    message: str
    details: AnthropicDetails


class AnthropicBody(BaseModel):
    """The body of every error on Anthropic's routes."""

    model_config = show(
        {
            "type": "error",
            "error": {
                "type": "not_found_error",
                "message": "there is no persona 'pirate'",
                "details": {"error_code": "persona_not_found", "param": "persona"},
            },
            "request_id": "5d1f0c2d3e4f5061728394a9b8c7d6e5",
        }
    )

    type: Literal["error"]
    error: AnthropicFault
    request_id: str | None


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Body, "description": "The request is at fault"},
    "5XX": {"model": Body, "description": "The server is at fault, or not ready"},
}
ANTHROPIC_RESPONSES = {status: response | {"model": AnthropicBody} for status, response in RESPONSES.items()}
_ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


def install(app: FastAPI) -> None:
    """Route every exception of an app through `respond`."""
    app.add_exception_handler(RequestValidationError, _respond_invalid)
    app.add_exception_handler(HTTPException, _respond_http)
    app.add_exception_handler(ClientDisconnect, _respond_disconnected)
    for kind in (MasqueradeError, MaskError, OSError, sqlite3.OperationalError, Exception):
        app.add_exception_handler(kind, _respond_failure)


class FailureMiddleware:
    """Responds to exceptions without a handler. The framework would do it outside of all other middleware, whose
    headers a page needs to read the error.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await _respond_failure(Request(scope), error)(scope, receive, send)


def body(error: MasqueradeError) -> dict[str, Any]:
    """OpenAI's body of an error, with a message of at most `MESSAGE_LIMIT` characters."""
    return {"error": {"message": _message(error), "type": error.type, "param": error.param, "code": error.code}}


def anthropic_body(error: MasqueradeError, request_id: str | None) -> dict[str, Any]:
    """Anthropic's body of an error, with its names of the types."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else error.type)
    details = {"error_code": error.code, "param": error.param}
    fault = {"type": kind, "message": _message(error), "details": details}
    return {"type": "error", "error": fault, "request_id": request_id}


def is_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's routes, or would be if there were one."""
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


class ErrorResponse(JSONResponse):
    """An error in the form of the API whose path the request has. The record of the request gets its code."""

    def __init__(self, error: MasqueradeError, headers: Mapping[str, str]) -> None:
        super().__init__(body(error), error.status, headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        state = scope.get("state", {})
        if is_anthropic(scope["path"]):
            self.body = self.render(anthropic_body(self._error, state.get("request_id")))
            self.headers["content-length"] = str(len(self.body))
        if record := state.get("record"):
            record.fail(self._error)
        await super().__call__(scope, receive, send)


def respond(error: MasqueradeError, headers: Mapping[str, str] | None = None) -> ErrorResponse:
    """The error as a response."""
    headers = dict(headers or {})
    if isinstance(error, Overloaded | NotReady):
        headers["Retry-After"] = str(error.retry_after)
    if error.retry is not None:
        headers["x-should-retry"] = str(error.retry).lower()
    if isinstance(error, TooLarge | TimedOut):
        headers["Connection"] = "close"  # the rest of the body is not read
    return ErrorResponse(error, headers)


def translate(error: Exception, where: str = "an answer that had begun") -> MasqueradeError:
    """The error that clients get for an exception. Logs what only the operator can fix, after `where` it happened."""
    if isinstance(error, MasqueradeError):
        return error
    if isinstance(error, MaskError):
        kind = next(_MASK_ERRORS[base] for base in type(error).__mro__ if base in _MASK_ERRORS)
        translated: MasqueradeError | None = kind(error.message)  # without the paths of `str(error)`
    else:
        translated = _translate_system(getattr(error, "errno", None), getattr(error, "sqlite_errorcode", 0) & 0xFF)
    if translated is None:
        _log.error("%s failed", where, exc_info=error)
        return MasqueradeError(_FAILED)
    if translated.status >= 500:
        _log.error("%s: %s", where, error)
    return translated


def _message(error: MasqueradeError) -> str:
    message = _LONG_WORD.sub(r"\1...", str(error))
    return f"{message[:MESSAGE_LIMIT]}..." if len(message) > MESSAGE_LIMIT else message


def _translate_system(number: int | None, sqlite: int) -> MasqueradeError | None:
    """The error for an errno, or for SQLite's primary result code."""
    if number in _FULL or sqlite == sqlite3.SQLITE_FULL:
        return StorageFull("the server has no room for this on its disk")
    if number in _UNUSABLE or sqlite in _SQLITE_UNUSABLE:
        return UnusableStore("the server's disk refuses this; its log says why")
    return NotReady("another process holds the store's tables; try again") if sqlite in _SQLITE_BUSY else None


def _respond_failure(request: Request, error: Exception) -> Response:
    if isinstance(error, ContextTooLong):  # a refused prompt is charged
        request.state.record.extra_tokens += error.tokens
    return respond(translate(error, f"{request.method} {request.url.path}"))


def _respond_invalid(_: Request, error: Exception) -> Response:
    """400 for a body that does not fit the schema, with the fault, the path to it and the value."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    field, fault = _path(faults[0]["loc"], error.body), _choose(faults, error.body)
    path = _path(fault["loc"], error.body)
    if isinstance(refusal := fault.get("ctx", {}).get("error"), Refusal):
        refused = refusal.error
        refused.param = f"{path}.{refused.param}" if path else refused.param
        return respond(refused)
    if not path:
        return respond(InvalidValue("the body must be a JSON object, with the header `Content-Type: application/json`"))
    if fault["type"] == "extra_forbidden":
        return respond(UnsupportedParameter(f"`{path}` is not supported", param=path))
    return respond(InvalidValue(f"{path}: {_explain(fault)}", param=field))


def _choose(faults: Sequence[Mapping[str, Any]], body: Any) -> Mapping[str, Any]:
    """The first fault; for a field of several types, the first that is not about the type, or else the one of the type
    that fits furthest. Faults about the type of one value are joined.
    """
    first = _path(faults[0]["loc"], body)
    rivals = [fault for fault in faults if f"{_path(fault['loc'], body)}.".startswith(f"{first}.")]
    if precise := next((fault for fault in rivals if not fault["type"].endswith("_type")), None):
        return precise
    chosen = max(rivals, key=lambda fault: _find_place(_path(fault["loc"], body)))
    alike = [fault for fault in rivals if _path(fault["loc"], body) == _path(chosen["loc"], body)]
    kinds = [*dict.fromkeys(_KINDS.get(fault["type"], fault["msg"].removeprefix(_SHOULD)) for fault in alike)]
    *others, last = kinds
    return {**chosen, "msg": _SHOULD + (f"{', '.join(others)} or {last}" if others else last)}


def _find_place(path: str) -> tuple[int, list[int]]:
    """How far a path leads into the body: deeper, or to a later item of a list, is further."""
    names = path.split(".")
    return len(names), [int(name) for name in names if name.isdecimal()]


def _explain(fault: Mapping[str, Any]) -> str:
    """The fault, and the value that has it."""
    message, context = str(fault["msg"]).removeprefix("Value error, "), fault.get("ctx", {})
    match fault["type"]:
        case "list_too_long" | "too_long":
            unit = "characters" if isinstance(fault["input"], str) else "items"
            return f"it has {len(fault['input'])} {unit}; the limit is {context['max_length']}"
        case "too_short":
            return f"it has {len(fault['input'])} items; it needs at least {context['min_length']}"
        case "union_tag_not_found":
            return f"it needs {context['discriminator']}".replace("'", "`")
        case "union_tag_invalid":
            return f"its type is {quote(context['tag'])}; it must be one of {context['expected_tags']}"
        case "missing" | "value_error":
            return message
    given = fault["input"]
    return f"{message}; given: {json.dumps(given) if given is None or isinstance(given, bool) else quote(given)}"


def _respond_http(request: Request, error: Exception) -> Response:
    """Errors of the framework itself."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return respond(NotFound(f"there is no route {where}"))
    if error.status_code == 405:
        return respond(MethodNotAllowed(f"{where} is not allowed here"), {"Allow": ", ".join(_methods(request))})
    refused = BadRequest(str(error.detail))
    refused.status = error.status_code
    return respond(refused)


def _respond_disconnected(*_: object) -> Response:
    """The client closed the connection before it had sent everything; the status is for the log."""
    return Response(status_code=499)


def _methods(request: Request) -> list[str]:
    """The methods of all routes with the path of a request; the framework names those of one route."""
    path, routes = request.scope["path"], iter_route_contexts(request.app.routes)
    return sorted({method for route in routes if route.path_regex.match(path) for method in route.methods or ()})


def _path(location: Sequence[int | str], body: Any) -> str:
    """`messages.0.role` of a fault's location, without the labels of union members that pydantic adds.

    A label is a name that the value has not, except for the last one, which may be missing; or one that comes twice.
    """
    names = []
    value = body if location[0] == "body" else None
    for place, name in enumerate(location):
        after = location[place + 1 : place + 2]
        if isinstance(value, dict) and place:
            if after and (name not in value or after[0] == name):
                continue
            value = value.get(name)
        elif isinstance(value, list) and place:
            value = value[name] if isinstance(name, int) and name < len(value) else value
        names.append(str(name)[:GIVEN])
    return ".".join(name for name in names if name != "body" and (name.isdecimal() or _is_field(name)))


def _is_field(name: str) -> bool:
    return name.replace("-", "_").isidentifier() and name.islower() and name not in _UNION_MEMBERS
