"""Everything that can go wrong while talking to a server, as one tree.

Knows how an OpenAI error body becomes a typed exception. Refuses to know about sockets.

    MasqueradeError             catch this to catch everything below
    ├── ConnectionFailed        nobody answered, or the answer broke off; the request may have had an effect
    │   └── TimedOut            nobody answered in time
    ├── UnexpectedAnswer        whoever answered does not speak this API
    ├── BuildFailed             a build ended without a persona; has the build
    └── ApiError                the server says no; has status, type, code, param
        ├── BadRequest          the request is wrong, and stays wrong when repeated
        ├── NotAllowed          the key is missing, unknown, or not good for this
        ├── NotFound            no such model, persona, build or file
        ├── Conflict            something changed in between
        ├── Overloaded          too many requests; try again after `retry_after` seconds
        └── ServerError         the server's own fault
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class MasqueradeError(Exception):
    """Base of the tree."""


class ConnectionFailed(MasqueradeError):
    """Nobody answered, or the answer broke off. Unless `reached`, nothing of the request has arrived."""

    def __init__(self, message: str, *, reached: bool = True) -> None:
        super().__init__(message)
        self.reached = reached


class TimedOut(ConnectionFailed):
    """Nobody answered in time."""


class UnexpectedAnswer(MasqueradeError):
    """Whoever answered does not speak this API."""


class BuildFailed(MasqueradeError):
    """A build ended without a persona: failed, with the server's reason, or cancelled."""

    def __init__(self, message: str, build: Any) -> None:
        super().__init__(message)
        self.build = build  # the `Build` as it ended


class ApiError(MasqueradeError):
    """The server says no.

    `status` is None for an error that came in the middle of a stream. `param` names the request field at fault.
    `passing` says that the same request may well succeed later.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,  # noqa: A002 - OpenAI's name for it
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        passing: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.passing = passing

    def __str__(self) -> str:
        known = {name: getattr(self, name) for name in ("status", "code", "param")}
        facts = [f"{name}={value}" for name, value in known.items() if value is not None]
        return f"{self.message} ({', '.join(facts)})" if facts else self.message


class BadRequest(ApiError):
    """The request is wrong, and stays wrong when repeated."""


class NotAllowed(ApiError):
    """The key is missing, unknown, or not good for this."""


class NotFound(ApiError):
    """No such model, persona, build or file."""


class Conflict(ApiError):
    """Something changed in between."""


class Overloaded(ApiError):
    """Too many requests. `retry_after` is in seconds, None where the server gave no hint."""


class ServerError(ApiError):
    """The server's own fault."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    429: Overloaded,
}
_PASSING = (429, 502, 503, 504)
_BY_TYPE: dict[str, type[ApiError]] = {
    "invalid_request_error": BadRequest,
    "authentication_error": NotAllowed,
    "permission_error": NotAllowed,
    "not_found_error": NotFound,
    "conflict_error": Conflict,
    "rate_limit_error": Overloaded,
}


def from_response(status: int, headers: Mapping[str, str], content: bytes) -> MasqueradeError:
    """The error that a response with a status other than 2xx stands for."""
    if status < 400:
        return UnexpectedAnswer(f"HTTP {status} where an answer was expected")
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else BadRequest)
    error = _body(content)
    return kind(
        _text(error.get("message")) or f"HTTP {status}: {content[:200].decode(errors='replace').strip()}",
        status=status,
        type=_text(error.get("type")),
        code=_text(error.get("code")),
        param=_text(error.get("param")),
        request_id=headers.get("x-request-id"),
        retry_after=_seconds(headers.get("retry-after")),
        passing=status in _PASSING and headers.get("x-should-retry") != "false",
    )


def from_event(error: Mapping[str, Any]) -> ApiError:
    """The error that arrived in the middle of a stream."""
    name = _text(error.get("type"))
    return _BY_TYPE.get(name or "", ServerError)(
        _text(error.get("message")) or "the server broke off the answer",
        type=name,
        code=_text(error.get("code")),
        param=_text(error.get("param")),
    )


def _body(content: bytes) -> Mapping[str, Any]:
    try:
        error = json.loads(content)["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _seconds(header: str | None) -> float | None:
    """Whole seconds are what this server sends; a date, which a proxy may send, counts as no hint."""
    return float(header) if header and header.isdecimal() else None
