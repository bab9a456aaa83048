"""The small world, made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # before transformers imports triton

from masquerade.model import Base, MaskManager, load
from tests import world
from tests.serving import Server, forking, serve

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a hub


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _forking() -> Iterator[None]:
    with forking():
        yield


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


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo, served by a process of its own."""
    with serve("--model", "demo") as running:
        yield running
