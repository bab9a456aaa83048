"""Deploys replicas and their ingress on Ray: on this machine alone, or on a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from masquerade.app import RequestIdMiddleware
from masquerade.cluster.connection import LOCAL, connect
from masquerade.cluster.ingress import Ingress
from masquerade.cluster.replica import Replica
from masquerade.errors import InvalidValue, NotReady
from masquerade.http.limits import Policy

MakeApp = Callable[[], RequestIdMiddleware[FastAPI]]
ENGINE, INGRESS = "engine", "ingress"
INGRESS_REQUESTS = 2048  # most at once in an ingress
HEALTH_SECONDS = 2.0  # between two checks of a replica, of which three in a row have to fail
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # the application has a log of its own
UPSCALE_SECONDS = 10.0  # above the target before a replica starts
STATS_SECONDS = 1.0  # between two reports of a replica's personas to the routers


@dataclass(frozen=True)
class Scale:
    """How many replicas there are, and what each one takes."""

    replicas: int = 1  # the least
    most_replicas: int | None = None  # with autoscaling; None: exactly `replicas`
    target_requests: float = 16.0  # a replica: more replicas start above it, and replicas stop below it
    most_requests: int = 512  # in a replica, waiting ones included
    cpus: float = 1.0
    gpus: float = 0.0
    drain_seconds: float = 600.0  # for the running answers of a replica that is replaced or no longer needed

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise InvalidValue(f"--replicas is {self.replicas}; it must be at least 1")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise InvalidValue(f"--max-replicas is {self.most_replicas}; it must be at least --replicas")


@contextmanager
def run_here(make_app: MakeApp, scale: Scale) -> Iterator[DeploymentHandle[Any]]:
    """The replicas on this machine, with a Ray of their own that ends with the block. Raises `NotReady`."""
    with connect(LOCAL, cpus=max(1, round(scale.cpus * scale.replicas)) + 1, gpus=round(scale.gpus * scale.replicas)):
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(proxy_location="Disabled", logging_config=_QUIET)
            yield _deploy(_describe_replicas(make_app, scale), "masquerade", None)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


def deploy(make_app: MakeApp, policy: Policy, scale: Scale, address: str, name: str, host: str, port: int) -> None:
    """Deploy or upgrade an application of a cluster, and wait until it runs.

    In an upgrade, replicas that are replaced complete their answers; new requests wait for the first new replica if
    there was only one. Raises `NotReady`.
    """
    with connect(address):
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        replicas = _describe_replicas(make_app, scale)
        _deploy(_describe_ingress(replicas, policy, scale.drain_seconds), name, "/")


def _deploy(application: serve.Application, name: str, prefix: str | None) -> DeploymentHandle[Any]:
    try:
        return serve.run(application, name=name, route_prefix=prefix, logging_config=_QUIET)
    except RuntimeError as error:
        raise NotReady(f"the replicas did not start: {error}") from error


def _describe_replicas(make_app: MakeApp, scale: Scale) -> serve.Application:
    numbers: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.most_replicas is not None:
        numbers = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.replicas,
                max_replicas=scale.most_replicas,
                target_ongoing_requests=scale.target_requests,
                upscale_delay_s=UPSCALE_SECONDS,
            )
        }
    routing: dict[str, Any] = {
        "request_router_class": "masquerade.cluster.router.PersonaRouter",
        "request_routing_stats_period_s": STATS_SECONDS,
    }
    engine: Any = serve.deployment(
        Replica,
        name=ENGINE,
        **numbers,
        max_ongoing_requests=scale.most_requests,
        max_queued_requests=scale.most_requests,  # in an ingress, if all replicas have as many as they take
        graceful_shutdown_timeout_s=scale.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        request_router_config=RequestRouterConfig(**routing),
        ray_actor_options={
            "num_cpus": scale.cpus,
            "num_gpus": scale.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(scale.cpus)))}},
        },
    )
    application: serve.Application = engine.bind(make_app)
    return application


class _IngressReplica:
    """An ingress as a deployment of its own, behind the proxies of the cluster."""

    def __init__(self, replicas: DeploymentHandle[Any], policy: Policy) -> None:
        self._app = RequestIdMiddleware(Ingress(replicas, policy))

    def __serve_build_asgi_app__(self) -> RequestIdMiddleware[Ingress]:
        return self._app


def _describe_ingress(replicas: serve.Application, policy: Policy, drain_seconds: float) -> serve.Application:
    ingress: Any = serve.deployment(
        serve.ingress()(_IngressReplica),
        name=INGRESS,
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=drain_seconds,
    )
    application: serve.Application = ingress.bind(replicas, policy)
    return application
