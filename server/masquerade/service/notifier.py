"""Wakes waiting coroutines from the engine's thread, with one call to the event loop per step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from masquerade.engine import Engine


class StepNotifier:
    """Collects the events to set during a step of the engine, and sets them on the event loop after it."""

    def __init__(self) -> None:
        self._pending: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, engine: Engine) -> None:
        """Deliver to the running loop after each step of an engine."""
        self._loop = asyncio.get_running_loop()
        engine.on_step = self._deliver

    def notify(self, event: asyncio.Event) -> None:
        """Set an event after the present step. For the engine's thread."""
        self._pending.add(event)

    def _deliver(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, set()
        with suppress(RuntimeError):  # the loop is closed
            assert self._loop is not None
            self._loop.call_soon_threadsafe(_set_all, pending)


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()
