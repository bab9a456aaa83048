"""Spreads out work that holds the interpreter lock, so that streams go on beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

REST = 2.0  # times as long as a piece of work took, nothing of its kind is done
MOST_SECONDS = 0.5  # of a pause


class Pace:
    """Lets one piece of work in at a time, and pauses after each. For one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn; it ends when the pause after the block is over, also if the block raises."""
        async with self._lock:
            started = time.perf_counter()
            try:
                yield
            finally:
                await asyncio.sleep(min(REST * (time.perf_counter() - started), MOST_SECONDS))
