"""The HTTP application: middleware, routes and lifespan."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from masquerade import __version__
from masquerade.anthropic import messages
from masquerade.database.postgresql import PostgreSQL
from masquerade.errors import WorkedElsewhere
from masquerade.http import errors, health, internal, playground, reference
from masquerade.http.access import AuthMiddleware
from masquerade.http.gateway import LoadReportMiddleware
from masquerade.http.limits import EXPOSED, CorsMiddleware, LimitsMiddleware, Policy
from masquerade.http.metrics import Metrics
from masquerade.http.request_log import RequestLogMiddleware
from masquerade.http.throttle import Throttle
from masquerade.jobs import JobService, Quotas, ResponseTable, open_responses
from masquerade.jobs.service import FILE
from masquerade.keys import Audit, Rates
from masquerade.keys.ring import Keyring
from masquerade.keys.table import KeyTable
from masquerade.openai import chat, completions, embeddings, files, fine_tuning, models, tokens
from masquerade.openai.batches import routes as batches
from masquerade.openai.batches.runner import BatchRunner
from masquerade.openai.responses import routes as responses
from masquerade.personas import build, routes
from masquerade.service import building
from masquerade.service.serving import Serving

_log = logging.getLogger(__name__)
App = TypeVar("App", bound=ASGIApp)
BATCH_SLOTS = 8  # most requests of batches in the engine
TAKE_OVER_SECONDS = 5.0  # between two attempts to run the jobs of a store, while another server does
_ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    embeddings.router,
    tokens.router,
    messages.router,
    models.router,
    routes.router,
    routes.aliases,
    files.router,
    fine_tuning.router,
    batches.router,
    build.router,
    health.router,
    playground.router,
    reference.router,
)


def create_app(
    serving: Serving,
    policy: Policy = Policy(),  # noqa: B008 - it is frozen
    clock: Callable[[], float] = time.monotonic,
    database: PostgreSQL | None = None,
) -> RequestIdMiddleware[FastAPI]:
    """The HTTP application. Its lifespan starts and stops the engine.

    `clock` returns seconds and drives the rate limits of keys. Keys, jobs, batches and responses are in the `database`,
    which the lifespan closes; in the store without one.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.notifier.bind(serving.engine)
        serving.engine.start()
        quotas = Quotas(response_days=policy.response_days)
        app.state.job_service = app.state.batch_runner = None
        waiting: asyncio.Task[None] | None = None
        try:
            run_jobs(_open_job_service(serving, keyring, quotas, database))
        except WorkedElsewhere as error:
            if database:  # that of another server without one
                raise
            _log.warning("%s; this one takes over when that one ends", error)
            waiting = asyncio.create_task(take_over(quotas))
        job_service = find_jobs()
        table = job_service.responses if job_service else ResponseTable(open_responses(_jobs(serving) / FILE), quotas)
        app.state.responses = table
        yield
        if waiting:
            waiting.cancel()
            await asyncio.wait([waiting])
        if runner := app.state.batch_runner:
            await runner.stop()
        if job_service := find_jobs():
            job_service.close()
        table.close()
        serving.engine.stop()
        serving.residency.close()
        serving.registry_cache.close()
        serving.workers.close()
        keyring.close()
        if database:
            database.close()

    def run_jobs(job_service: JobService) -> None:
        slots = max(1, min(BATCH_SLOTS, serving.engine.config.max_running // 2))
        runner = BatchRunner(job_service, partial(internal.post, whole), slots, policy.body_bytes)
        job_service.runner.start()
        runner.start()
        app.state.job_service, app.state.batch_runner = job_service, runner

    async def take_over(quotas: Quotas) -> None:
        while find_jobs() is None:
            await asyncio.sleep(TAKE_OVER_SECONDS)
            if serving.engine.is_draining:  # it ends soon itself
                return
            opening = asyncio.create_task(asyncio.to_thread(_open_job_service, serving, keyring, quotas, database))
            try:
                run_jobs(await asyncio.shield(opening))  # it may wait for the store's lock, and delete files
            except WorkedElsewhere:
                continue
            except asyncio.CancelledError:
                with suppress(Exception):
                    (await opening).close()
                raise
            except Exception:
                _log.exception("the jobs of the store cannot be run; trying again")
            else:
                _log.info("this server runs the jobs of the store now")

    def find_jobs() -> JobService | None:
        job_service: JobService | None = app.state.job_service
        return job_service

    keyring = Keyring(KeyTable(serving.store.root, database))
    metrics = Metrics(serving, find_jobs, gateway=policy.gateway_metrics)
    middleware = [  # outermost first
        Middleware(RequestLogMiddleware, metrics, Audit(serving.store.root)),
        Middleware(errors.FailureMiddleware),
        Middleware(LimitsMiddleware, policy),
        Middleware(AuthMiddleware, keyring, Rates(clock), policy),
    ]
    if policy.gateway_metrics:
        middleware.append(Middleware(LoadReportMiddleware, serving))
    if policy.cors_origins:
        cors = Middleware(
            CorsMiddleware, policy.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED
        )
        middleware.insert(1, cors)  # outside the middleware that refuses, so that pages can read the errors
    app = reference.DocumentedAPI(
        title="Masquerade",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses=errors.RESPONSES,
        middleware=middleware,
        telemetry={"metrics": False, "logs": False, "operation_spans": False, "auto_configure": _can_trace()},
    )
    app.state.large_bodies, app.state.imports = Throttle(), Throttle()
    app.state.serving, app.state.metrics, app.state.policy = serving, metrics, policy
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    whole: RequestIdMiddleware[FastAPI] = RequestIdMiddleware(app)
    return whole


def describe() -> FastAPI:
    """An application with the routes only, for its OpenAPI description."""
    app = reference.DocumentedAPI(title="Masquerade", version=__version__, responses=errors.RESPONSES)
    for router in _ROUTERS:
        app.include_router(router)
    return app


def _can_trace() -> bool:
    """Whether OpenTelemetry's SDK and exporter are installed. Warns if they are missing and an endpoint is set."""
    if find_spec("opentelemetry.sdk") and find_spec("opentelemetry.exporter"):
        return True
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        _log.warning("no traces are sent; they need pip install 'masquerade[otel]'")
    return False


def _jobs(serving: Serving) -> Path:
    """The folder of the store's jobs and responses."""
    folder = serving.store.root / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _open_job_service(serving: Serving, keyring: Keyring, quotas: Quotas, database: PostgreSQL | None) -> JobService:
    """The jobs of the store, whose work runs on the engine's thread. Raises as `JobService`."""
    return JobService(
        _jobs(serving),
        partial(building.build, serving, keyring),
        lambda item: serving.engine.run_background(item).result(),
        quotas,
        partial(building.sweep, serving),
        database,
    )


class RequestIdMiddleware(Generic[App]):
    """The outermost middleware: every response, also of an error, has `x-request-id` and `openai-processing-ms`.

    A client may send the id: 1 to 128 printable ASCII characters. Exceptions do not end the connection.
    """

    def __init__(self, app: App) -> None:
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
                if errors.is_anthropic(scope["path"]):
                    headers["request-id"] = request_id  # where Anthropic's clients look for it
                headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - started)))
            await send(message)

        client_id = dict(scope.get("headers", [])).get(b"x-request-id", b"").decode("latin-1")
        request_id = client_id if _is_valid(client_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            if not answered:  # otherwise errors.py has logged it
                raise


def _is_valid(client_id: str) -> bool:
    return client_id.isascii() and client_id.isprintable() and 0 < len(client_id) <= 128


if __name__ == "__main__":
    print(reference.write(describe().openapi()), end="")
