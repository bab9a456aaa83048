"""Handlers of SIGTERM and SIGHUP. While uvicorn runs, it handles SIGTERM itself; see `draining`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from threading import Thread

_log = logging.getLogger(__name__)


def exit_on_sigterm() -> None:
    """Make SIGTERM exit the process with status 0, while the model is loaded and after a server has drained.

    Without a handler the kernel ignores SIGTERM for process 1 of a container.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def run_on_sighup(action: Callable[[], None]) -> None:
    """Make SIGHUP run `action` on a new thread. A failure is logged and has no other effect."""

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            _log.error("SIGHUP changed nothing: %s", error)

    signal.signal(signal.SIGHUP, lambda *_: Thread(target=attempt, name="sighup", daemon=True).start())
