"""Work off the event loop: bounded, and shared fairly between owners."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from masquerade.errors import Overloaded
from masquerade.service.workers import Workers


class Gate:
    """Holds work until it is opened, and remembers in which order it was done."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.done: list[str] = []

    def work(self, name: str) -> Callable[[], str]:
        def pass_through() -> str:
            assert self.opened.wait(30)
            self.done.append(name)
            return name

        return pass_through


def run(scenario: Callable[[Workers, Gate], Coroutine[Any, Any, None]]) -> Gate:
    gate, workers = Gate(), Workers(threads=1, most=100)
    try:
        asyncio.run(scenario(workers, gate))
    finally:
        gate.opened.set()
        workers.close()
    return gate


def start(workers: Workers, gate: Gate, owner: str, name: str, size: int = 1) -> asyncio.Task[str]:
    return asyncio.create_task(workers.run(owner, size, gate.work(name)))


def test_owners_take_turns() -> None:
    async def scenario(workers: Workers, gate: Gate) -> None:
        asked = [start(workers, gate, name[0], name) for name in ("a1", "a2", "a3", "a4", "b1", "c1", "b2")]
        await asyncio.sleep(0)
        gate.opened.set()
        assert await asyncio.gather(*asked) == ["a1", "a2", "a3", "a4", "b1", "c1", "b2"]

    assert run(scenario).done == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_too_many_bytes_are_refused_until_there_is_room() -> None:
    async def scenario(workers: Workers, gate: Gate) -> None:
        held = [start(workers, gate, "a", "1", 60), start(workers, gate, "a", "2", 40)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=r"100 bytes.*limit is 100") as refusal:
            await workers.run("b", 1, gate.work("3"))
        assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
        gate.opened.set()
        await asyncio.gather(*held)
        assert await workers.run("b", 1, gate.work("3")) == "3"

    assert run(scenario).done == ["1", "2", "3"]


def test_what_is_larger_than_the_limit_is_done_alone() -> None:
    async def scenario(workers: Workers, gate: Gate) -> None:
        gate.opened.set()
        assert await workers.run("a", 1000, gate.work("1")) == "1"

    run(scenario)


def test_failures_and_those_who_give_up_leave_their_place() -> None:
    async def scenario(workers: Workers, gate: Gate) -> None:
        with pytest.raises(ZeroDivisionError):
            await workers.run("a", 90, lambda: 1 // 0)
        first, *others = [start(workers, gate, "a", str(number), 30) for number in range(3)]
        await asyncio.sleep(0)
        others[0].cancel()
        gate.opened.set()
        assert await asyncio.gather(first, others[1]) == ["0", "2"]
        assert await workers.run("b", 100, gate.work("3")) == "3"

    assert run(scenario).done == ["0", "2", "3"]


def test_the_event_loop_goes_on_meanwhile() -> None:
    async def scenario(workers: Workers, gate: Gate) -> None:
        asked = start(workers, gate, "a", "1")
        for _ in range(100):
            await asyncio.sleep(0)
        assert not asked.done()
        gate.opened.set()
        assert await asked == "1"

    run(scenario)
