"""Work of requests that would keep the event loop busy: tokenising, and compiling grammars."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from masquerade.errors import Overloaded

T = TypeVar("T")
THREADS = 2
MOST_BYTES = 2**24  # of all texts that are being worked on, or wait


class Workers:
    """A few threads, and owners who take turns to use them. For one event loop.

    What waits is bounded by the bytes of the texts, which the work is proportional to.
    """

    def __init__(self, threads: int = THREADS, most: int = MOST_BYTES) -> None:
        self._pool = ThreadPoolExecutor(threads, "tokenising")
        self._free = threads
        self._most, self._size = most, 0
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # who waits, by owner; the first owner is next

    async def run(self, owner: str, size: int, work: Callable[[], T]) -> T:
        """The outcome of work on texts of `size` bytes. Raises `Overloaded` if too much is waiting already."""
        if self._size and self._size + size > self._most:
            raise Overloaded(
                f"{self._size} bytes of text are waiting to be tokenised, and the limit is {self._most}; try again"
            )
        self._size += size
        try:
            await self._take_turn(owner)
            try:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
            finally:
                self._pass_on()
        finally:
            self._size -= size

    async def _take_turn(self, owner: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(owner, deque()).append(turn)
        await turn

    def _pass_on(self) -> None:
        """Give the place to the next owner, who goes to the end if more of theirs waits."""
        while self._lines:
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            turn = line.popleft()
            if line:
                self._lines[owner] = line
            if not turn.done():  # it was not given up
                turn.set_result(None)
                return
        self._free += 1

    def close(self) -> None:
        """End the threads when they have done what they do now."""
        self._pool.shutdown(wait=False, cancel_futures=True)
