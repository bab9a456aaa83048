"""`GET /healthz` (the process runs), `GET /readyz` (the engine takes requests), `GET /version` and `GET /metrics`.

Load balancers may probe with HEAD.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from masquerade import __version__
from masquerade.errors import NotReady
from masquerade.http.access import Measuring
from masquerade.http.dependencies import Served
from masquerade.http.metrics import Metrics
from masquerade.http.wire import Schema, show

router = APIRouter()


class Health(Schema):
    """The state of the server."""

    model_config = show({"status": "ok"})

    status: Literal["ok", "ready"]


class Version(Schema):
    """The version of the server."""

    model_config = show({"version": __version__})

    version: str


_METRICS = {
    "schema": {"type": "string"},
    "example": 'masquerade_answers_total{persona="introvert",reason="stop"} 17.0\n',
}


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=None, responses={200: {"model": Health}})
async def check_health() -> dict[str, str]:
    """Always 200 while the event loop turns."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=None, responses={200: {"model": Health}})
@router.head("/health", include_in_schema=False)
@router.get("/health", response_model=None, responses={200: {"model": Health}})
@router.head("/ping", include_in_schema=False)
@router.get("/ping", response_model=None, responses={200: {"model": Health}})
@router.post("/ping", response_model=None, responses={200: {"model": Health}})
async def check_readiness(serving: Served) -> dict[str, str]:
    """200 while the engine's thread takes requests, else 503. vLLM calls it `/health`, SageMaker `/ping`."""
    if reason := serving.engine.unready_reason:
        raise NotReady(reason)
    return {"status": "ready"}


@router.get("/version", response_model=Version)
async def show_version() -> Version:
    """The version of the server, as vLLM says it."""
    return Version(version=__version__)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": _METRICS}}})
def show_metrics(http: Request, _: Measuring) -> Response:
    """Prometheus' text format. Once there are keys, it needs one with the scope `metrics` or `admin`."""
    metrics: Metrics = http.app.state.metrics
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)
