"""A uvicorn server that completes running answers before it exits.

It keeps listening while it drains: new requests get 503, and a load balancer sees the state in `/readyz`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from masquerade.http.limits import Protocol

_log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Stops after `drain` has returned on the first signal, and immediately on the second."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        if self._draining or not self.started:
            super().handle_exit(sig, frame)
            return
        self._draining = True
        Thread(target=self._drain_and_exit, args=(sig, frame), name="drain", daemon=True).start()

    def _drain_and_exit(self, sig: int, frame: FrameType | None) -> None:
        _log.info("draining: no new requests are accepted; running ones may complete")
        try:
            self._drain()
        finally:
            super().handle_exit(sig, frame)


def make_server(app: ASGIApp, drain: Callable[[], None]) -> DrainingServer:
    """The HTTP server of an application, which exits when `drain` has returned."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        loop="asyncio",  # also where uvloop is installed: it is what the tests run on
        ws="none",
        timeout_graceful_shutdown=10,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    return DrainingServer(config, drain)
