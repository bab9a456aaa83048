"""The small world, made once a session.

A plugin of its own, since what it imports is on every machine: `pytest --noconftest -p tests.small_world` runs tests
that need no more, such as those of a CUDA device, without the packages of a server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # before transformers imports triton

from masquerade.model import Base, MaskManager, load
from tests import world


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder: Path) -> Base:
    """A base of one's own: a test may attach, detach and run engines on it."""
    return load(str(tiny_folder), device="cpu")


@pytest.fixture
def manager(tiny: Base) -> Iterator[MaskManager]:
    manager = MaskManager.attach(tiny.model)
    yield manager
    manager.detach()
