"""One entry for every request: what metrics, log, audit and traces say about it.

Knows times, names and numbers. Refuses to know content: an entry has no field that could hold any.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from masquerade.errors import MasqueradeError
from masquerade.http.metrics import Histograms, Metrics
from masquerade.keys import Audit, Key
from masquerade.keys import Scope as KeyScope

if TYPE_CHECKING:
    from masquerade.service.serving import ResolvedPersona

_log = logging.getLogger("masquerade.access")
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_AUDITED: frozenset[KeyScope] = frozenset({"build", "admin"})
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_GONE = 499  # the client went away before it had an answer


@dataclass(frozen=True)
class Usage:
    """Tokens in and out."""

    prompt: int
    completion: int
    cached: int = 0  # of the prompt, those that needed no computing

    def render(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class RequestRecord:
    """What is known about a request so far. For one thread: the event loop's."""

    metrics: Metrics
    request_id: str
    method: str
    started: float = field(default_factory=time.perf_counter)
    route: str = "_other"
    status: int = 0
    code: str | None = None  # of an error, before the answer or in its midst
    key: Key | None = None
    scope: KeyScope | None = None  # that the route needs
    limited: str | None = None  # the limit that refused it
    targets: list[str] = field(default_factory=list)  # what it acts on: personas, a file, a job
    persona: str | None = None  # that answers
    generation: str | None = None
    first_token: float | None = None  # seconds since the start
    reasons: list[str] = field(default_factory=list)  # why its answers ended
    unanswered: int = 0  # tokens of texts that were only tokenised, or refused because they are too long
    closed: bool = False
    _usage: Callable[[], Usage] | None = None
    _times: Histograms | None = None
    _last: dict[int, float] = field(default_factory=dict)  # when the last token of each answer came

    def begin(self, resolved: ResolvedPersona, usage: Callable[[], Usage]) -> None:
        """Tokens will be made for this request; `usage` tells how many there are whenever it is asked."""
        self.persona, self.generation, self._usage = resolved.persona, resolved.generation, usage  # not the mask itself
        self._times = self.metrics.times_of(resolved.persona)

    def token(self, index: int, now: float) -> None:
        """One more token of an answer, at a moment of `time.perf_counter`."""
        last = self._last.get(index)
        self._last[index] = now
        if self._times is None:
            return
        if last is not None:
            self._times.gap.observe(now - last)
        elif self.first_token is None:
            self.first_token = now - self.started
            self._times.first.observe(self.first_token)

    def end(self, reason: str) -> None:
        """One of its answers is complete."""
        self.reasons.append(reason)

    def fail(self, error: MasqueradeError) -> None:
        """It failed when its status had been sent already."""
        self.code = error.code

    @property
    def tokens(self) -> int:
        """Tokens that it has used, in and out, and those that it tried to use."""
        usage = self._usage() if self._usage else None
        return self.unanswered + (usage.prompt + usage.completion if usage else 0)

    def close(self) -> dict[str, Any]:
        """Enter it into the metrics; everything worth telling about it."""
        seconds = time.perf_counter() - self.started
        metrics, usage = self.metrics, self._usage() if self._usage else None
        metrics.requests.labels(self.method, self.route, str(self.status)).inc()
        if self.code:
            metrics.errors.labels(self.code).inc()
        if self.limited:
            metrics.limited.labels(self.limited).inc()
        told: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "code": self.code,
            "key": self.key.id if self.key else None,
            "seconds": round(seconds, 6),
        }
        if usage:
            metrics.count(self.persona, usage.prompt, usage.cached, usage.completion, self.reasons)
            if self._times:
                self._times.whole.observe(seconds)
            told |= {
                "persona": self.persona,
                "generation": self.generation,
                "prompt_tokens": usage.prompt,
                "cached_tokens": usage.cached,
                "completion_tokens": usage.completion,
                "finish_reasons": self.reasons,
                "first_token_seconds": self.first_token and round(self.first_token, 6),
            }
        return told

    @property
    def is_action(self) -> bool:
        """Whether it tried to change or take something that needs more than chatting."""
        return self.scope in _AUDITED and (self.method != "GET" or self.scope == "admin")


class RequestLogMiddleware:
    """Opens an entry before everything else sees a request, and closes it when the end of the answer is to be sent, or
    nobody is there to read it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, audit: Audit) -> None:
        self._app = app
        self._metrics = metrics
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["entry"] = entry = RequestRecord(
            self._metrics,
            state.get("request_id", ""),
            scope["method"] if scope["method"] in _METHODS else "_other",
        )

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            elif entry.status >= 400 and entry.code is None:
                entry.code = _read_code(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self._close(entry, scope)  # before the end is sent: whoever has an answer finds it in the books
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            entry.status, entry.code = entry.status or 500, entry.code or "internal_error"
            raise
        finally:
            if not entry.closed:
                await self._close(entry, scope)

    async def _close(self, entry: RequestRecord, scope: Scope) -> None:
        entry.closed = True
        entry.status = entry.status or _GONE
        entry.route = getattr(scope.get("route"), "path", entry.route)
        told = entry.close()
        _log.log(
            logging.DEBUG if entry.route in _PROBES else logging.INFO,
            "%s %s %d in %.3f s",
            entry.method,
            entry.route,
            entry.status,
            told["seconds"],
            extra={"fields": told},
        )
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes({f"masquerade.{name}": value for name, value in told.items() if value is not None})
        if entry.is_action:
            await asyncio.shield(asyncio.to_thread(self._write, entry, scope))

    def _write(self, entry: RequestRecord, scope: Scope) -> None:
        self._audit.write(
            key=entry.key.id if entry.key else None,
            action=scope["route"].name,
            target=" ".join(entry.targets or map(str, scope.get("path_params", {}).values())),
            outcome=entry.code or ("done" if entry.status < 400 else str(entry.status)),
            request_id=entry.request_id,
        )


def _read_code(body: bytes) -> str | None:
    """The code of an error as it was told to the client."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return None
    return code if isinstance(code, str) else None
