"""A watch notices what anybody changes, and never waits."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from maskstore import Registry
from maskstore.sqlite import Watch
from tests.maskstore import world


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture
def watch(registry: Registry) -> Iterator[Watch]:
    with closing(registry.watch()) as watch:
        yield watch


def test_looking_changes_nothing_and_writing_does(registry: Registry, watch: Watch) -> None:
    digest = registry.store.add(world.mask(1))
    seen = {watch.look()}
    assert watch.look() in seen
    for change in (
        lambda: registry.publish("calm", digest),
        lambda: registry.change("calm", gamma=0.5),
        lambda: registry.alias("quiet", "calm"),
        lambda: Registry(registry.store.root).remove("calm"),
    ):
        change()
        assert watch.look() not in seen
        seen.add(watch.look())
    registry.names()
    assert watch.look() in seen


def test_another_file_in_its_place_is_noticed(registry: Registry, watch: Watch, tmp_path: Path) -> None:
    before = watch.look()
    other = Registry(tmp_path / "other")
    os.replace(other.path, registry.path)
    assert watch.look() not in (None, before)
    registry.publish("calm", registry.store.add(world.mask(1)))
    assert registry.resolve("calm").number == 1


def test_while_somebody_writes_it_cannot_be_told(registry: Registry, watch: Watch) -> None:
    before = watch.look()
    with closing(sqlite3.connect(registry.path, isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        started = time.monotonic()
        assert watch.look() is None
        assert time.monotonic() - started < 5  # sqlite's patience is 30 s
        writer.execute("rollback")
    assert watch.look() == before


def test_what_is_not_there_is_not_made(registry: Registry, watch: Watch) -> None:
    registry.path.unlink()
    assert watch.look() is None
    assert not registry.path.exists()


def test_a_closed_watch_looks_again(registry: Registry, watch: Watch) -> None:
    assert watch.look() is not None
    watch.close()
    watch.close()
    assert watch.look() is not None
