"""`masquerade ray`: replicas of a server on a Ray cluster."""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from masquerade.cli import heap
from masquerade.cli.config import FLAG, read_section
from masquerade.cli.server_options import ServerOptions, accept_server_options
from masquerade.errors import InvalidValue
from masquerade.plan.processors import read_processors

app = typer.Typer(help="Serve from a Ray cluster.", no_args_is_help=True)
_log = logging.getLogger("masquerade")


@app.callback()
def describe() -> None:
    """Serve from a Ray cluster."""


@app.command("deploy")
@accept_server_options
def deploy(
    options: ServerOptions,
    config: Annotated[  # noqa: ARG001 - its callback reads it
        Path | None,
        typer.Option(FLAG, is_eager=True, callback=read_section, help="TOML file; options are in [ray.deploy]."),
    ] = None,
    address: Annotated[str, typer.Option(help="The Ray cluster: `auto`, HOST:PORT, or ray://HOST:PORT.")] = "auto",
    name: Annotated[str, typer.Option(help="Name of the application in Ray Serve.")] = "masquerade",
    host: Annotated[str, typer.Option(help="Address that the proxy of each node listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that the proxies listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Replicas, at least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas, at most: their number follows the load; by default --replicas.")
    ] = None,
    target_requests: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Requests of a replica, waiting ones included, that autoscaling aims at; by default --max-running.",
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0.1, help="Cores that a replica takes.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that a replica takes.")] = 0.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds for the running answers of a replica that is replaced or stopped.")
    ] = 600.0,
) -> None:
    """Deploy a server on a Ray cluster, or upgrade it: running answers complete on the replicas that they began on.

    The store has to be a bucket, or a folder that all nodes share.
    """
    import_ray()
    from masquerade.cli.serve import prepare_store  # as late as Ray

    root, keys = prepare_store(options)
    with heap.importing():
        from masquerade.cli import server
        from masquerade.cli.policy import make_policy
        from masquerade.cluster import deployment
        from masquerade.http import logs
    logs.configure(options.log_format)
    policy = make_policy(options, host, keys)
    scale = deployment.Scale(
        replicas,
        max_replicas,
        target_requests=target_requests or float(options.max_running),
        most_requests=server.count_requests(options),
        cpus=cpus,
        gpus=gpus,
        drain_seconds=drain_seconds,
    )
    server.announce_plan(options)
    make_app = partial(server.make_app, options, root, policy)
    deployment.deploy(make_app, policy, scale, address, name, host, port)
    _log.info("%s is deployed; `serve status` shows its replicas, `serve shutdown` ends them", name)


def import_ray() -> None:
    """Raises `InvalidValue` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InvalidValue("replicas need Ray; install it with pip install 'masquerade[ray]'")


def share_processors(replicas: int) -> float:
    """Cores for each of several replicas on this machine."""
    return max(1.0, float(read_processors().threads // replicas))
