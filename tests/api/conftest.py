"""A real server on a thread of the test's own process, so that a test can look into it and break it from within."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from maskstore import Registry
from masquerade.api import Serving, create_app
from masquerade.engine import Engine
from masquerade.model import Base, MaskManager, Residency, Shelf


@pytest.fixture
def serving(tiny: Base, manager: MaskManager, tmp_path: Path) -> Serving:
    registry = Registry(tmp_path / "store")
    residency = Residency(manager, Shelf(registry.store, tiny.fingerprint), 2**20)
    return Serving(tiny, Engine(tiny), registry.store, registry, residency, manager)


@pytest.fixture
def http(serving: Serving) -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(create_app(serving), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client
    server.should_exit = True
    thread.join()
