"""Spreads out work that holds the interpreter lock, so that streams continue beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

PAUSE_RATIO = 2.0  # length of a pause in terms of the work before it
MOST_SECONDS = 0.5  # of a pause


class Throttle:
    """Runs one piece of work at a time and pauses after each. For one event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the lock and hold it through the block and the pause after it, even if the block raises."""
        async with self._lock:
            started = time.perf_counter()
            try:
                yield
            finally:
                await asyncio.sleep(min(PAUSE_RATIO * (time.perf_counter() - started), MOST_SECONDS))
