"""A server that lets answers end before it goes.

Knows signals and their order. Refuses to know what is drained. While that goes on the server still listens, so that
whoever comes is told to come back later, and a load balancer sees it in `/readyz`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from types import FrameType

import uvicorn

_log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Stops at the first signal once `drain` has returned, and at the second one at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._draining or not self.started:
            super().handle_exit(sig, frame)
            return
        self._draining = True
        Thread(target=self._leave, args=(sig, frame), name="drain", daemon=True).start()

    def _leave(self, sig: int, frame: FrameType | None) -> None:
        _log.info("no new requests are taken; those that have begun may end")
        try:
            self._drain()
        finally:
            super().handle_exit(sig, frame)
