"""An engine over the small world."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from masquerade.engine import Engine, EngineConfig
from masquerade.model import Base, MaskManager


@pytest.fixture
def make_engine(tiny: Base, manager: MaskManager) -> Iterator[Callable[..., Engine]]:
    """Engines with other limits; all are stopped at the end."""
    engines = []

    def make(**limits: int) -> Engine:
        engines.append(Engine(tiny, EngineConfig(**limits)))
        return engines[-1]

    yield make
    for engine in reversed(engines):
        engine.stop()
