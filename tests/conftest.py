"""Fixtures of all tests, and the order of the files."""

from __future__ import annotations

import gc
import os
import ssl
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.small_world import manager, tiny, tiny_folder  # noqa: F401, fixtures; imports triton before others do

# isort: split
from masquerade.packaged import find_cache
from tests.databases import Cluster, Place, run_cluster
from tests.serving import Server, forking, serve

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a hub


# The files that take longest, in this order before all others: no process should be alone with one at the end.
LONGEST = (
    "test_families.py",
    "test_distribution.py",
    "test_tutorial.py",
    "model/test_smollm2.py",
    "pruning/test_quantized.py",
    "pruning/test_builder.py",
    "pruning/test_real_data.py",
    "cli/test_smollm2_served.py",
    "building/test_sdk.py",
    "pruning/test_command.py",
    "client/test_masq.py",
    "cli/test_commands.py",
    "kernels/test_native.py",
    "web/test_accessibility.py",
    "pruning/test_executor.py",
    "smollm2/test_personas.py",
    "database/test_servers.py",
    "web/test_building.py",
    "building/test_kill.py",
    "cli/test_real_model.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "serve the demo from so many replicas on Ray, and run only the tests that ask that server"
    parser.addoption("--replicas", type=int, default=1, help=about)
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--replicas") > 1:
        asking = [item for item in items if isinstance(item, pytest.Function) and "server" in item.fixturenames]
        items[:] = [item for item in asking if not item.get_closest_marker("one_cache")]
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; `make long` runs it"))
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported: to search it takes each full collection 0.3 s


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _one_ssl_context() -> Iterator[None]:
    """Clients of httpx share it: to read all certificates takes each of them 50 ms, and no test needs one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the tests' own, which all their processes share: a model that was downloaded, and nothing else."""
    own, models = tmp_path_factory.getbasetemp() / "cache" / "masquerade", find_cache() / "masquerade" / "models"
    if "PYTEST_XDIST_WORKER" in os.environ:
        own = tmp_path_factory.getbasetemp().parent / "cache" / "masquerade"
    own.mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (own / "models").symlink_to(models)
    os.environ.setdefault("PIP_CACHE_DIR", str(find_cache() / "pip"))
    os.environ["XDG_CACHE_HOME"] = str(own.parent)


@pytest.fixture(scope="session", autouse=True)
def _forking(_cache: None) -> Iterator[None]:
    with forking():
        yield


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """The demo, served by a process of its own, or from replicas."""
    replicas = pytestconfig.getoption("--replicas")
    if replicas == 1:
        with serve("--model", "demo") as running:
            yield running
        return
    with serve("--model", "demo", "--replicas", str(replicas), env={}, start_seconds=300) as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with run_cluster() as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where tables are: each test that asks for it runs on both databases."""
    place = Place(tmp_path, request.getfixturevalue("cluster") if request.param == "postgresql" else None)
    yield place
    place.close()


@pytest.fixture
def shared(cluster: Cluster, tmp_path: Path) -> Iterator[Place]:
    """A database that several servers share."""
    place = Place(tmp_path, cluster)
    yield place
    place.close()
