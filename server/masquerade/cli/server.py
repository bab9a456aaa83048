"""A server's engine with its base and personas, and the application around it. Imports torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from fastapi import FastAPI

from maskstore import Registry, Store, mirror
from masquerade.app import RequestIdMiddleware, create_app
from masquerade.cli.options import open_database
from masquerade.cli.plan import announce
from masquerade.cli.progress import hide_loading_bars, report_quarters
from masquerade.cli.server_options import ServerOptions
from masquerade.cli.stores import open_store
from masquerade.engine import Engine, EngineConfig, Request
from masquerade.errors import InvalidValue
from masquerade.http import logs
from masquerade.http.limits import Policy
from masquerade.model import Base, HostCache, MaskManager, Residency, VerifiedStore, load
from masquerade.service.serving import Serving

_log = logging.getLogger("masquerade")
MOST_NAMED = 8  # personas in a line of the log
OTHER_REQUESTS = 64  # to a replica at once, which need no engine: metrics, lists, uploads


def make_app(options: ServerOptions, root: Path, policy: Policy) -> RequestIdMiddleware[FastAPI]:
    """Load a model, and make the application around it; sets this process's log up, which a replica's is not."""
    logs.configure(options.log_format)
    serving = load_serving(options, root)
    log_personas(serving)
    return create_app(serving, policy, database=open_database(options.database))


def announce_plan(options: ServerOptions) -> None:
    """Log what the server will take. Raises as `load` does, where the header of the model shows it."""
    announce(
        options.model,
        options.device,
        options.split_layers,
        options.dtype,
        make_config(options),
        options.mask_bytes,
        options.quantization,
    )


def load_serving(options: ServerOptions, root: Path) -> Serving:
    """Load the base and open its store."""
    hide_loading_bars()
    announce_plan(options)
    base = load(
        options.model,
        device=options.device,
        split_layers=options.split_layers,
        dtype=options.dtype,
        quantization=options.quantization,
        keep_blocks=True,
        report=report_quarters(lambda line: _log.info("%s", line)),
    )
    base = replace(base, name=options.served_model_name or base.name)
    store, registry = open_store(
        root,
        base.name,
        base.fingerprint,
        require_signed=options.require_signed,
        accept_tensors=options.accept_tensor_signatures,
    )
    if url := mirror.find_url(root):
        _log.info("personas are in %s; %s has this machine's copy, keys and jobs", url, root)
    return assemble(
        base,
        make_config(options),
        store,
        registry,
        options.mask_bytes,
        options.host_mask_bytes,
        accept_uncertified=options.accept_uncertified,
    )


def make_config(options: ServerOptions) -> EngineConfig:
    """The part of the options that is the engine's."""
    return EngineConfig(
        options.max_running,
        options.max_waiting,
        options.max_batch_tokens,
        options.cache_bytes,
        speculate=options.speculate,
    )


def count_requests(options: ServerOptions) -> int:
    """Requests that a replica takes at once: beyond those of the engine's batch and queue it refuses them itself."""
    return options.max_running + options.max_waiting + OTHER_REQUESTS


def share_gpus(options: ServerOptions, replicas: int) -> int:
    """GPUs that each of several replicas on this machine takes. Raises `InvalidValue` if there are too few."""
    if options.device == "cpu" or not (options.device == "cuda" or torch.cuda.is_available()):
        return 0
    each = options.split_layers
    if (found := torch.cuda.device_count()) < replicas * each:
        own = "a GPU of its own" if each == 1 else f"{each} GPUs of its own"
        raise InvalidValue(f"--replicas is {replicas}, and each needs {own}; this machine has {found}")
    return each


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


def log_personas(serving: Serving) -> None:
    """Log what is served, and warn of personas whose certificates do not hold on the quantised base."""
    names = ", ".join(revision.name for revision in serving.personas())
    devices = ", ".join(map(str, serving.base.devices))
    _log.info("%s on %s with the personas: %s", serving.base.name, devices, names or "none yet")
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
