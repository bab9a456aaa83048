"""Puts the routes together.

Knows the application's life: the engine starts before the first request and stops after the last.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send

from masquerade import __version__
from masquerade.errors import NotReady
from masquerade.http import errors, health, playground, reference
from masquerade.http.access import AuthMiddleware
from masquerade.http.limits import EXPOSED, CorsMiddleware, LimitsMiddleware, Policy
from masquerade.http.metrics import Metrics
from masquerade.http.pace import Pace
from masquerade.http.request_log import RequestLogMiddleware
from masquerade.jobs import JobService
from masquerade.keys import Audit, Keyring, KeyTable, Rates
from masquerade.openai import chat, completions, files, fine_tuning, models, tokens
from masquerade.personas import routes
from masquerade.service import building
from masquerade.service.serving import Serving

_log = logging.getLogger(__name__)
_ROUTERS = (
    chat.router,
    completions.router,
    tokens.router,
    models.router,
    routes.router,
    routes.aliases,
    files.router,
    fine_tuning.router,
    fine_tuning.one_shot,
    health.router,
    playground.router,
    reference.router,
)


def create_app(
    serving: Serving,
    policy: Policy = Policy(),  # noqa: B008 - it is frozen
    clock: Callable[[], float] = time.monotonic,
) -> RequestIdMiddleware:
    """The HTTP application over what is served, as the policy says; the limits of keys go by the clock, in seconds.

    Starting it starts the engine.
    """

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        serving.notifier.open(serving.engine)
        serving.engine.start()
        app.state.job_service = job_service = _open_job_service(serving, keyring)
        yield
        if job_service:
            job_service.close()
        serving.engine.stop()
        serving.residency.close()
        serving.names.close()
        serving.workers.close()
        keyring.close()

    def count_jobs() -> Mapping[str, int]:
        job_service: JobService | None = app.state.job_service
        return job_service.table.count_jobs() if job_service else {}

    keyring = Keyring(KeyTable(serving.store.root))
    counted = Metrics(serving, count_jobs)
    around = [  # outermost first
        Middleware(RequestLogMiddleware, counted, Audit(serving.store.root)),
        Middleware(LimitsMiddleware, policy),
        Middleware(AuthMiddleware, keyring, Rates(clock), policy),
    ]
    if policy.cors_origins:
        sharing = Middleware(
            CorsMiddleware, policy.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED
        )
        around.insert(1, sharing)  # before whatever may refuse, so that pages can read the refusal
    app = reference.Described(
        title="Masquerade",
        version=__version__,
        lifespan=live,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
        middleware=around,
        telemetry={"metrics": False, "logs": False, "operation_spans": False, "auto_configure": _can_trace()},
    )
    app.state.large_bodies, app.state.imports = Pace(), Pace()
    app.state.serving, app.state.metrics, app.state.policy = serving, counted, policy
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    return RequestIdMiddleware(app)


def describe() -> FastAPI:
    """The routes with nothing behind them, for their description."""
    app = reference.Described(title="Masquerade", version=__version__, responses=errors.RESPONSES)
    for router in _ROUTERS:
        app.include_router(router)
    return app


def _can_trace() -> bool:
    """Whether traces can go to the endpoint that OpenTelemetry's variables name, if they name one."""
    if find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter"):
        return True
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        _log.warning("no traces are sent: this needs pip install 'masquerade[otel]'")
    return False


def _open_job_service(serving: Serving, keyring: Keyring) -> JobService | None:
    """The jobs of the store, unless another server has them; their work is done on the engine's thread."""
    folder, engine = serving.store.root / "jobs", serving.engine
    try:
        job_service = JobService(
            folder, partial(building.build, serving, keyring), lambda item: engine.run_background(item).result()
        )
    except NotReady as error:
        _log.warning("%s", error)
        return None
    building.sweep(serving, job_service)
    job_service.runner.start()
    return job_service


class RequestIdMiddleware:
    """Around everything, also around what failed: every answer has an `x-request-id` and says how long it took, and no
    failure ends a connection.

    The id is the caller's own, if it is a sane one.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        answered, started = False, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - started)))
            await send(message)

        given = dict(scope.get("headers", [])).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            if not answered:  # else the failure is logged, and answered, by errors.py
                raise


if __name__ == "__main__":
    print(reference.write(describe().openapi()), end="")
