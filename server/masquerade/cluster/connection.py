"""Connects to a Ray cluster, or starts a Ray on this machine."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from masquerade.errors import NotReady

LOCAL = "local"
NAMESPACE = "serve"
OBJECT_BYTES = 2**28  # for what is on its way between processes of one machine; more goes through the disk
PROBE_SECONDS = 5.0  # for the port of a cluster to answer
_ENVIRONMENT = {  # of a Ray that this process starts
    "RAY_worker_niceness": "0",  # the replicas are what this machine is for
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",  # every line of the log
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to Ray's makers
}


@contextmanager
def connect(address: str, cpus: int | None = None, gpus: int | None = None) -> Iterator[None]:
    """A connection to a cluster, or to a Ray of this process's own if the address is `LOCAL`. Raises `NotReady`.

    `cpus` and `gpus` are those of the latter; by default, all of this machine.
    """
    environment = _ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)} if address == LOCAL else {}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    own: dict[str, Any] = {
        "num_cpus": cpus,
        "num_gpus": gpus or None,
        "object_store_memory": OBJECT_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",  # the ports that can be are for this machine only
    }
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _probe(address)
        ray.init(
            address=address,
            namespace=NAMESPACE,
            configure_logging=False,
            **(own if address == LOCAL else {}),
        )
    except Exception as error:  # Ray raises what comes
        raise NotReady(_explain(address, error)) from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler aborts
    try:
        yield
    finally:
        ray.shutdown()


def _explain(address: str, error: Exception) -> str:
    if address == LOCAL:
        logs = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "session_latest", "logs")
        return f"Ray does not start on this machine: {error}; what it logged is in {logs}"
    if isinstance(error, OSError):
        return (
            f"no Ray cluster answers at {address}; `ray start --head` starts one, and one that needs a token wants "
            "RAY_AUTH_MODE=token here too"
        )
    return f"the Ray cluster at {address} cannot be used: {error}"


def _probe(address: str) -> None:
    """Raise `OSError` if nothing listens at HOST:PORT, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), PROBE_SECONDS).close()
