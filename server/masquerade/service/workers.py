"""Threads for the work of requests that would block the event loop: tokenising, and compiling grammars."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from masquerade.errors import Overloaded

T = TypeVar("T")
THREADS = 2
MOST_BYTES = 2**24  # of all texts in work or in the queues


class Turns:
    """A number of slots that owners take in turn. For one event loop."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # by owner; the first owner is next

    async def acquire(self, owner: str) -> None:
        """Wait for a slot."""
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was given to a task that is cancelled
                self.release()
            raise

    def release(self) -> None:
        """Give the slot to the next owner. An owner with more in its queue goes to the end."""
        while self._queues:
            owner = next(iter(self._queues))
            queue = self._queues.pop(owner)
            turn = queue.popleft()
            if queue:
                self._queues[owner] = queue
            if not turn.done():  # not cancelled
                turn.set_result(None)
                return
        self._free += 1


class Workers:
    """A thread pool that serves owners in turn. For one event loop.

    The queues are bounded by the bytes of the texts, to which the work is proportional.
    """

    def __init__(self, threads: int = THREADS, most: int = MOST_BYTES) -> None:
        self._pool = ThreadPoolExecutor(threads, "tokenising")
        self._turns = Turns(threads)
        self._most, self._size = most, 0

    async def run(self, owner: str, size: int, work: Callable[[], T]) -> T:
        """The result of work on texts of `size` bytes. Raises `Overloaded` if the queues are full."""
        if self._size and self._size + size > self._most:
            raise Overloaded(
                f"{self._size} bytes of text wait for tokenisation, and the limit is {self._most}; try again later"
            )
        self._size += size
        try:
            await self._turns.acquire(owner)
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
            finally:
                self._turns.release()
        finally:
            self._size -= size

    def close(self) -> None:
        """End the threads after their present work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
