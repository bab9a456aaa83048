"""A real server on a thread of the test's own process, so that a test can look into it and break it from within."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from maskstore import Registry
from masquerade.app import create_app
from masquerade.engine import Engine
from masquerade.model import Base, MaskManager, Residency, VerifiedStore
from masquerade.service.serving import Serving
from tests.contract.here import listen


@pytest.fixture
def serving(tiny: Base, manager: MaskManager, tmp_path: Path) -> Serving:
    registry = Registry(tmp_path / "store")
    residency = Residency(manager, VerifiedStore(registry.store, tiny.fingerprint), 2**20)
    return Serving(tiny, Engine(tiny), registry.store, registry, residency, manager)


@pytest.fixture
def http(serving: Serving) -> Iterator[httpx.Client]:
    with listen(create_app(serving)) as client:
        yield client
