"""A server on a thread of the test's own process: it starts at once, and a test can look into it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from maskstore import Registry
from masquerade.app import create_app
from masquerade.engine import Engine, EngineConfig, Request
from masquerade.http.limits import Policy, Protocol
from masquerade.model import MaskManager, Residency, VerifiedStore, load
from masquerade.service.serving import Serving


@contextmanager
def serve_here(
    model: Path,
    store: Path,
    config: EngineConfig | None = None,
    policy: Policy | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Serving, httpx.Client]]:
    """Serve a model until the block ends."""
    base = load(str(model), device="cpu")
    manager, registry = MaskManager.attach(base.model), Registry(store)
    residency = Residency(manager, VerifiedStore(registry.store, base.fingerprint), 2**24)
    serving = Serving(base, Engine(base, config), registry.store, registry, residency, manager)
    app = create_app(serving, policy or Policy(), clock)
    with listen(app) as http:
        yield serving, http


@contextmanager
def listen(app: FastAPI) -> Iterator[httpx.Client]:
    """Have an app answer on a free port, as `masquerade serve` would, until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, http=Protocol, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield http
    finally:
        server.should_exit = True
        thread.join()


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every token of this process's engines take 50 ms, so that there is time to end an answer."""
    accept = Request.accept

    def dawdle(self: Request, *told: Any) -> Any:
        time.sleep(0.05)
        return accept(self, *told)

    monkeypatch.setattr(Request, "accept", dawdle)


def forbid_ends(serving: Serving) -> dict[str, float]:
    """A `logit_bias` with which an answer ends only at its limit."""
    return {str(end): -100 for end in serving.base.ends}
