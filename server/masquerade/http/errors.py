"""Renders every failure as OpenAI's error body.

Knows the one place where exceptions become HTTP. Refuses to let a stack trace or a path out.
"""

from __future__ import annotations

import errno
import logging
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import maskstore
from maskstore import MaskError
from masquerade.errors import (
    GIVEN,
    BadRequest,
    ContextTooLong,
    InvalidValue,
    MasqueradeError,
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
from masquerade.http.wire import Refusal

_log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_SQLITE_UNUSABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_SQLITE_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FAILED = "the server failed; its log says why"
MOST_WORDS = 1000  # characters of a message
_RUN = re.compile(rf"(\S{{{GIVEN - 3}}})\S{{4,}}")  # what is longer than a word was given, and is cut
_UNION_MEMBERS = ("str", "list", "float", "int", "dict")

_MASK_ERRORS: Mapping[type, type[MasqueradeError]] = {
    maskstore.InvalidName: InvalidValue,
    maskstore.InvalidMaskValue: InvalidValue,
    maskstore.MaskNotFound: PersonaNotFound,
    maskstore.MaskExists: PersonaExists,
    maskstore.MaskConflict: RevisionConflict,
    maskstore.StoreBusy: NotReady,
    MaskError: PersonaDamaged,
}


class Fault(BaseModel):
    """What went wrong: `code` is for programs, `message` for people; `param` is the field at fault, if there is one."""

    message: str
    type: str
    param: str | None
    code: str


class Body(BaseModel):
    """Every failure."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "error": {
                    "message": "there is no file 'file-none'",
                    "type": "not_found_error",
                    "param": "training_file",
                    "code": "file_not_found",
                }
            }
        }
    )

    error: Fault


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Body, "description": "The request is at fault"},
    "5XX": {"model": Body, "description": "The server is at fault, or not ready"},
}


class MethodNotAllowed(BadRequest):
    """The route exists, with another method."""

    status = 405
    code = "method_not_allowed"


def install(app: FastAPI) -> None:
    """Route every exception of an app through `respond`."""
    app.add_exception_handler(MasqueradeError, _on_known)
    app.add_exception_handler(MaskError, _on_mask)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(OSError, _on_system)
    app.add_exception_handler(sqlite3.OperationalError, _on_system)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_unknown)


def body(error: MasqueradeError) -> dict[str, Any]:
    """The error as a client sees it; never long, whatever it repeats."""
    message = _RUN.sub(r"\1...", str(error))
    if len(message) > MOST_WORDS:
        message = f"{message[:MOST_WORDS]}..."
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}


def respond(error: MasqueradeError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The error as a response."""
    headers = dict(headers or {})
    if isinstance(error, Overloaded | NotReady):
        headers["Retry-After"] = str(error.retry_after)
    if error.retry is not None:
        headers["x-should-retry"] = str(error.retry).lower()
    if isinstance(error, TooLarge | TimedOut):
        headers["Connection"] = "close"  # nobody wants the rest of the body
    return JSONResponse(body(error), status_code=error.status, headers=headers)


def translate(error: Exception) -> MasqueradeError:
    """What is said about a failure after the status has been sent; of what nobody foresaw, the log has the rest."""
    if isinstance(error, MasqueradeError):
        return error
    if isinstance(error, MaskError):
        return _name_fault(error)
    refusal = _name_refusal(getattr(error, "errno", None), getattr(error, "sqlite_errorcode", 0) & 0xFF)
    _log.error("an answer failed in its midst", exc_info=error)
    return refusal or MasqueradeError(_FAILED)


def _on_known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MasqueradeError)
    if isinstance(error, ContextTooLong):  # the attempt is paid for like a prompt
        request.state.entry.unanswered += error.tokens
    return respond(error)


def _on_mask(request: Request, error: Exception) -> JSONResponse:
    """What the store says, without the paths it knows."""
    assert isinstance(error, MaskError)
    named = _name_fault(error)
    if named.status >= 500:
        _log.error("%s %s: %s", request.method, request.url.path, error)
    return respond(named)


def _name_fault(error: MaskError) -> MasqueradeError:
    kind = next(_MASK_ERRORS[base] for base in type(error).__mro__ if base in _MASK_ERRORS)
    return kind(error.message)


def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    """A body that does not fit the schema: 400 with the fault, the path to it and what was given."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    field, fault = _path(faults[0]["loc"]), _choose(faults)
    path = _path(fault["loc"])
    if isinstance(refusal := fault.get("ctx", {}).get("error"), Refusal):
        refused = refusal.error
        refused.param = f"{path}.{refused.param}" if path else refused.param
        return respond(refused)
    if not path:
        return respond(InvalidValue("the body must be a JSON object, with the header `Content-Type: application/json`"))
    if fault["type"] == "extra_forbidden":
        return respond(UnsupportedParameter(f"`{path}` is not supported", param=path))
    return respond(InvalidValue(f"{path}: {_tell(fault)}", param=field))


def _choose(faults: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first fault; where a field may have one of several types, that of the type which was given."""
    first = _path(faults[0]["loc"])
    rivals = [fault for fault in faults if f"{_path(fault['loc'])}.".startswith(f"{first}.")]
    return next((fault for fault in rivals if not fault["type"].endswith("_type")), faults[0])


def _tell(fault: Mapping[str, Any]) -> str:
    """What is wrong, and what was given if that is short enough to be told."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] in ("list_too_long", "too_long"):
        return f"it has {len(fault['input'])} items; the limit is {fault['ctx']['max_length']}"
    if fault["type"] in ("missing", "value_error"):
        return message
    return f"{message}; given: {quote(fault['input'])}"


def _on_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return respond(NotFound(f"there is no route {where}"))
    if error.status_code == 405:
        return respond(MethodNotAllowed(f"{where} is not allowed here"), {"Allow": ", ".join(_methods(request))})
    refused = BadRequest(str(error.detail))
    refused.status = error.status_code
    return respond(refused)


def _on_system(request: Request, error: Exception) -> JSONResponse:
    """What the operating system refuses: the disk can be mended by whoever is told of it."""
    refusal = _name_refusal(getattr(error, "errno", None), getattr(error, "sqlite_errorcode", 0) & 0xFF)
    if refusal is None:
        return _on_unknown(request, error)
    _log.error("%s %s: %s", request.method, request.url.path, error)
    return respond(refusal)


def _name_refusal(number: int | None, sqlite: int) -> MasqueradeError | None:
    """What an errno, or sqlite's primary result code, says about the store."""
    if number in _FULL or sqlite == sqlite3.SQLITE_FULL:
        return StorageFull("the server has no room for this on its disk")
    if number in _UNUSABLE or sqlite in _SQLITE_UNUSABLE:
        return UnusableStore("the server's disk refuses this; its log says why")
    return NotReady("another process holds the store's tables; try again") if sqlite in _SQLITE_BUSY else None


def _on_gone(*_: object) -> Response:
    """Nobody reads this: the client went away before it had sent everything."""
    return Response(status_code=499)


def _on_unknown(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return respond(MasqueradeError(_FAILED))


def _methods(request: Request) -> list[str]:
    """The methods with which the path of a request may be asked for; the framework names those of one route."""
    path, routes = request.scope["path"], iter_route_contexts(request.app.routes)
    return sorted({method for route in routes if route.path_regex.match(path) for method in route.methods or ()})


def _path(location: Sequence[int | str]) -> str:
    """`messages.0.role` of a fault's location, without the names of union members that pydantic adds."""
    names = [str(part)[:GIVEN] for part in location if part != "body"]
    return ".".join(name for name in names if name.isdigit() or _is_field(name))


def _is_field(name: str) -> bool:
    return name.replace("-", "_").isidentifier() and name.islower() and name not in _UNION_MEMBERS
