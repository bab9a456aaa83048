"""From the engine's thread to the event loop.

Knows who was told something in a step, and wakes the loop once for all of them. Refuses to know what they were told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from masquerade.engine import Engine


class StepNotifier:
    """Bells of the event loop, rung by the engine's thread."""

    def __init__(self) -> None:
        self._due: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, engine: Engine) -> None:
        """Deliver to the running loop after each step of an engine."""
        self._loop = asyncio.get_running_loop()
        engine.on_step = self._deliver

    def ring(self, event: asyncio.Event) -> None:
        """On the engine's thread: set an event of the loop's as soon as the step is over."""
        self._due.add(event)

    def _deliver(self) -> None:
        if not self._due:
            return
        due, self._due = self._due, set()
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_set, due)


def _set(bells: Iterable[asyncio.Event]) -> None:
    for event in bells:
        event.set()
