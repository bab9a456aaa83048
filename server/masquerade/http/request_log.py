"""One record of every request, for metrics, log, audit and traces. No field holds content of prompts or answers."""

from __future__ import annotations

import asyncio
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
_PROBES = frozenset({"/healthz", "/readyz", "/health", "/ping", "/metrics"})
_AUDITED: frozenset[KeyScope] = frozenset({"build", "admin"})
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_DISCONNECTED = 499  # the client left before the response began


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens; `UsageObject` is their form on the wire."""

    prompt: int
    completion: int
    cached: int = 0  # tokens of the prompt that were in the KV cache


@dataclass
class RequestRecord:
    """The facts about a request so far. For the event loop's thread only."""

    metrics: Metrics
    request_id: str
    method: str
    started: float = field(default_factory=time.perf_counter)
    route: str = "_other"
    status: int = 0
    code: str | None = None  # of an error, also of one within a stream; `errors.py` sets that of a response
    key: Key | None = None
    scope: KeyScope | None = None  # of the route
    limited: str | None = None  # the rate limit that refused it
    targets: list[str] = field(default_factory=list)  # personas, files and jobs of the audit log
    persona: str | None = None
    digest: str | None = None  # of the persona's mask
    first_token: float | None = None  # seconds since the start
    reasons: list[str] = field(default_factory=list)  # why its answers ended
    extra_tokens: int = 0  # charged without an answer: only tokenised, or too many
    embeds: bool = False  # vectors, which are no answers
    background: bool = False  # nobody waits for the answer: its times are no measure of the server
    closed: bool = False
    _usage: Callable[[], Usage] | None = None
    _times: Histograms | None = None
    _last: dict[int, float] = field(default_factory=dict)  # time of the last token, by answer

    def begin(self, resolved: ResolvedPersona, usage: Callable[[], Usage]) -> None:
        """Before generation begins. `usage` returns the tokens so far."""
        self.persona, self.digest, self._usage = resolved.persona, resolved.digest, usage  # not the mask itself
        self._times = None if self.background else self.metrics.times_of(resolved.persona)

    def add_token(self, index: int, now: float) -> None:
        """One more token of an answer, at the time `now` of `time.perf_counter`."""
        last = self._last.get(index)
        self._last[index] = now
        if self._times is None:
            return
        if last is not None:
            self._times.gap.observe(now - last)
        elif self.first_token is None:
            self.first_token = now - self.started
            self._times.first.observe(self.first_token)

    def end_answer(self, reason: str) -> None:
        """One of the answers has finished."""
        self.reasons.append(reason)

    def fail(self, error: MasqueradeError) -> None:
        """The response is an error, or an error ends it."""
        self.code = error.code

    @property
    def tokens(self) -> int:
        """The tokens to charge."""
        usage = self._usage() if self._usage else None
        return self.extra_tokens + (usage.prompt + usage.completion if usage else 0)

    def close(self) -> dict[str, Any]:
        """Update the metrics and return the fields of the log line."""
        seconds = time.perf_counter() - self.started
        metrics, usage = self.metrics, self._usage() if self._usage else None
        if not self.background:  # a line of a batch is no HTTP request, and is tried again
            metrics.requests.labels(self.method, self.route, str(self.status)).inc()
            if self.code:
                metrics.errors.labels(self.method, self.code).inc()
            if self.limited:
                metrics.limited.labels(self.limited).inc()
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "code": self.code,
            "key": self.key.id if self.key else None,
            "seconds": round(seconds, 6),
        }
        if usage:
            reasons = () if self.embeds else self.reasons
            metrics.count(self.persona, usage.prompt, usage.cached, usage.completion, reasons)
            if self._times and usage.prompt:  # what the engine refuses is no answer
                if not self.embeds:
                    self._times.whole.observe(seconds)
                left = not self.reasons or self.status == _DISCONNECTED
                error = self.code or (str(_DISCONNECTED) if left else "")
                tokens = usage.completion / max(1, len(self.reasons))
                metrics.observe_operation(self.route, self.persona, seconds, self.first_token, tokens, error)
            fields |= {
                "persona": self.persona,
                "generation": self.digest,
                "prompt_tokens": usage.prompt,
                "cached_tokens": usage.cached,
                "completion_tokens": usage.completion,
                "finish_reasons": self.reasons,
                "first_token_seconds": self.first_token and round(self.first_token, 6),
            }
        return fields

    @property
    def is_action(self) -> bool:
        """Whether the audit log has this request: a change, or a read that needs the scope `admin`."""
        return self.scope in _AUDITED and (self.method != "GET" or self.scope == "admin")


class RequestLogMiddleware:
    """Opens a record before the other middleware, and closes it before the end of the response is sent or when the
    client disconnects.
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
        state["record"] = record = RequestRecord(
            self._metrics,
            state.get("request_id", ""),
            scope["method"] if scope["method"] in _METHODS else "_other",
        )

        async def send_and_record(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                await self._close(
                    record, scope
                )  # before the end is sent, so that a client finds its request in the logs
            await send(message)

        try:
            await self._app(scope, receive, send_and_record)
        except Exception:
            record.status, record.code = record.status or 500, record.code or "internal_error"
            raise
        finally:
            if not record.closed:
                await self._close(record, scope)

    async def _close(self, record: RequestRecord, scope: Scope) -> None:
        record.closed = True
        record.status = record.status or _DISCONNECTED
        record.route = getattr(scope.get("route"), "path", record.route)
        fields = record.close()
        _log.log(
            logging.DEBUG if record.route in _PROBES else logging.INFO,
            "%s %s %d in %.3f s",
            record.method,
            record.route,
            record.status,
            fields["seconds"],
            extra={"fields": fields},
        )
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes({f"masquerade.{name}": value for name, value in fields.items() if value is not None})
        if record.is_action:
            await asyncio.shield(asyncio.to_thread(self._write, record, scope))

    def _write(self, record: RequestRecord, scope: Scope) -> None:
        self._audit.write(
            key=record.key.id if record.key else None,
            action=scope["route"].name,
            target=" ".join(record.targets or map(str, scope.get("path_params", {}).values())),
            outcome=record.code or ("done" if record.status < 400 else str(record.status)),
            request_id=record.request_id,
        )
