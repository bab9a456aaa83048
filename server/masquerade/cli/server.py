"""The parts of a server: the engine with a base and its personas, and the HTTP application around it. Imports torch."""

from __future__ import annotations

import logging

import uvicorn

from maskstore import Registry, Store
from masquerade.app import create_app
from masquerade.cli.draining import DrainingServer
from masquerade.database import PostgreSQL
from masquerade.engine import Engine, EngineConfig, Request
from masquerade.http.limits import Policy, Protocol
from masquerade.model import Base, HostCache, MaskManager, Residency, VerifiedStore
from masquerade.service.serving import Serving

_log = logging.getLogger("masquerade")
MOST_NAMED = 8  # personas in a line of the log


def assemble(
    base: Base,
    config: EngineConfig,
    store: Store,
    registry: Registry,
    mask_bytes: int,
    host_mask_bytes: int | None,
    *,
    accept_uncertified: bool,
) -> Serving:
    """The base, its personas and an engine that is warm: the first client does not wait for lazy initialisation.

    `mask_bytes` is for masks on the device; `host_mask_bytes` for masks in host memory, None for the default.
    """
    if host_mask_bytes is None:
        host_mask_bytes = 0 if base.device.type == "cpu" else 4 * mask_bytes
    manager = MaskManager.attach(base.model)
    verified_store = VerifiedStore(store, base.fingerprint)
    residency = Residency(manager, verified_store, mask_bytes, HostCache(host_mask_bytes), config.max_waiting)
    engine = Engine(base, config)
    _warm_up(engine)
    return Serving(base, engine, store, registry, residency, manager, accept_uncertified=accept_uncertified)


def make_server(
    serving: Serving, policy: Policy, drain_seconds: float, database: PostgreSQL | None = None
) -> DrainingServer:
    """The HTTP server, which lets running answers complete for `drain_seconds` after SIGTERM."""
    config = uvicorn.Config(
        create_app(serving, policy, database=database),
        http=Protocol,
        ws="none",
        timeout_graceful_shutdown=10,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    return DrainingServer(config, lambda: serving.engine.drain(drain_seconds))


def log_personas(serving: Serving) -> None:
    """Log what is served, and warn of personas whose certificates do not hold on the quantised base."""
    names = ", ".join(revision.name for revision in serving.personas())
    _log.info("%s on %s with the personas: %s", serving.base.name, serving.base.device, names or "none yet")
    uncertified = [revision.name for revision in serving.own_personas() if serving.find_warning(revision)]
    if not uncertified:
        return
    more = f" and {len(uncertified) - MOST_NAMED} more" if len(uncertified) > MOST_NAMED else ""
    _log.warning(
        "%s without a certificate on %s weights: %s%s; `masquerade masks certify` measures one",
        "served" if serving.accept_uncertified else "not served",
        serving.base.quantization or "unquantised",
        ", ".join(uncertified[:MOST_NAMED]),
        more,
    )


def _warm_up(engine: Engine) -> None:
    """Generate one short answer."""
    length = min(8, engine.base.context - 2)
    engine.generate([Request([0] * length, max_tokens=2, emit=lambda _: None)])
