"""`masquerade serve`: load a model and answer HTTP requests until a signal arrives."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from masquerade.cli import heap
from masquerade.cli.options import open_database, require_ray
from masquerade.cli.server_options import ServerOptions, accept_server_options
from masquerade.cli.signals import exit_on_sigterm, run_on_sighup
from masquerade.cli.stores import check_keys, check_store, find_store
from masquerade.errors import CannotListen

if TYPE_CHECKING:
    from masquerade.cli.draining import DrainingServer
    from masquerade.http.limits import Policy

_log = logging.getLogger("masquerade")


@accept_server_options
def serve(
    options: ServerOptions,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free one.")] = 8000,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Load the model this many times on this machine, behind one address that routes by persona (needs the "
            "extra `ray`).",
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, seconds for running answers to complete.")
    ] = 10.0,
) -> None:
    """Serve a model and its personas over OpenAI's API."""
    exit_on_sigterm()
    root, keys = prepare_store(options)
    run_on_sighup(lambda: _log_keys(add_keys(options, root)))

    # FastAPI, which the checks before need not
    from masquerade.cli.loading import Loading
    from masquerade.cli.policy import make_policy
    from masquerade.http import logs

    policy = make_policy(options, host, keys)
    logs.configure(options.log_format)
    with _listen(host, port) as listener, ExitStack() as running:
        with Loading(listener):
            if replicas is None:
                server = _load(options, root, policy, drain_seconds)
            else:
                server = _start_replicas(options, root, policy, drain_seconds, replicas, running)
        _log_keys(keys)
        name, number = listener.getsockname()[:2]
        _log.info("listening on http://%s:%d", f"[{name}]" if ":" in name else name, number)
        heap.freeze()
        server.run(sockets=[listener])


def prepare_store(options: ServerOptions) -> tuple[Path, int]:
    """The folder of the store, which is usable, and the number of its keys, those of `--key-file` included."""
    root = find_store(options.store, options.model)
    check_store(root)
    return root, add_keys(options, root)


def add_keys(options: ServerOptions, root: Path) -> int:
    """Add the keys of `--key-file`; returns the number of all keys."""
    from masquerade.cli import keyfiles  # and with it SQLAlchemy, which the checks before need not

    database = open_database(options.database)
    try:
        if database:
            check_keys(root, database)
        return keyfiles.add_missing(root, options.key_file or (), database)
    finally:
        if database:
            database.close()


def _load(options: ServerOptions, root: Path, policy: Policy, drain_seconds: float) -> DrainingServer:
    """A server of this process."""
    with heap.importing():  # clients are answered while these are imported
        from masquerade.cli import server
        from masquerade.cli.draining import make_server
    app = server.make_app(options, root, policy)
    return make_server(app, lambda: app.app.state.serving.engine.drain(drain_seconds))


def _start_replicas(
    options: ServerOptions, root: Path, policy: Policy, drain_seconds: float, count: int, running: ExitStack
) -> DrainingServer:
    """A server that passes requests on to replicas, which end with the `running` block."""
    from masquerade.cli.ray import share_processors

    require_ray()
    with heap.importing():
        from masquerade.app import RequestIdMiddleware
        from masquerade.cli import server
        from masquerade.cli.draining import make_server
        from masquerade.cluster.deployment import Scale, run_here
        from masquerade.cluster.ingress import Ingress
    scale = Scale(
        count,
        most_requests=server.count_requests(options),
        cpus=share_processors(count),
        gpus=server.share_gpus(options, count),
        drain_seconds=drain_seconds,
    )
    server.announce_plan(options)
    handle = running.enter_context(run_here(partial(server.make_app, options, root, policy), scale))
    ingress = Ingress(handle, policy)
    return make_server(RequestIdMiddleware(ingress), partial(ingress.drain, drain_seconds))


def _log_keys(count: int) -> None:
    access = "each request needs one" if count else "anyone who can reach the server can use it"
    _log.info("%d keys: %s", count, access)


def _listen(host: str, port: int) -> socket.socket:
    """Bind the socket before the model is loaded, so that a port in use fails at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # asyncio sets this only on sockets made with the protocol number of TCP, and accepted connections inherit it.
    # Without it, the second write of an answer waits about 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
