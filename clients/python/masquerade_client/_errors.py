"""The exceptions of this package, and how error responses become exceptions.

MasqueradeError             catch this to catch everything below
├── ConnectionFailed        no response, or an incomplete one; the request may have had an effect
│   └── TimedOut            no response in time
├── UnexpectedAnswer        the response is not of this API
├── BuildFailed             a build failed or was cancelled; has the build
└── ApiError                an error response; has status, type, code, param
    ├── BadRequest          the request is invalid; do not repeat it
    ├── NotAllowed          the key is missing, unknown, or lacks the scope
    ├── NotFound            no such model, persona, build or file
    ├── Conflict            another change came first
    ├── Overloaded          too many requests; try again after `retry_after` seconds
    └── ServerError         the server failed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class MasqueradeError(Exception):
    """Base of all exceptions of this package."""


class ConnectionFailed(MasqueradeError):
    """No response, or an incomplete one. If `reached` is false, the server did not get the request."""

    def __init__(self, message: str, *, reached: bool = True) -> None:
        super().__init__(message)
        self.reached = reached


class TimedOut(ConnectionFailed):
    """No response in time."""


class UnexpectedAnswer(MasqueradeError):
    """The response is not of this API."""


class BuildFailed(MasqueradeError):
    """A build failed, with the server's reason, or was cancelled.

    If the server refused one mask of two, `build.made` has the other.
    """

    def __init__(self, message: str, build: Any) -> None:
        super().__init__(message)
        self.build = build  # the `Build` as it ended


class ApiError(MasqueradeError):
    """An error response of the server.

    `status` is None for an error that arrived within a stream. `param` names the invalid request field.
    `passing`: the same request may succeed later.
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
    """The request is invalid; do not repeat it."""


class NotAllowed(ApiError):
    """The key is missing, unknown, or lacks the scope."""


class NotFound(ApiError):
    """No such model, persona, build or file."""


class Conflict(ApiError):
    """Another change came first."""


class Overloaded(ApiError):
    """Too many requests. `retry_after` is in seconds, None if the server gave none."""


class ServerError(ApiError):
    """The server failed."""


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
    """The error for a response with a status other than 2xx."""
    if status < 400:
        return UnexpectedAnswer(f"HTTP {status} instead of a response of this API")
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
    """The error for an error event of a stream."""
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
    """Whole seconds, as this server sends them; None for a date, which a proxy may send."""
    return float(header) if header and header.isdecimal() else None
