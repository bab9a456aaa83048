"""What signals do to a server before and after uvicorn hears them.

Knows SIGTERM and SIGHUP. Refuses to know how answers end: that is `draining`.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from threading import Thread

_log = logging.getLogger(__name__)


def end_when_told() -> None:
    """SIGTERM ends the process with status 0 from now on: while a model is loaded, and once a server has drained.

    Without a handler the kernel keeps SIGTERM from the first process of a container.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def reread_when_told(reread: Callable[[], None]) -> None:
    """SIGHUP calls `reread` from now on, on a thread of its own; if that fails, the log says so and nothing ends."""

    def attempt() -> None:
        try:
            reread()
        except Exception as error:
            _log.error("SIGHUP changed nothing: %s", error)

    signal.signal(signal.SIGHUP, lambda *_: Thread(target=attempt, name="reread", daemon=True).start())
