"""Python's garbage collector in a process that starts, serves and ends: collections that free nothing are left out."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and what needs it in the block; what is imported is never searched for garbage.

    It is 400000 objects, and almost none of them is garbage. To search them again and again would take a third of the
    time of the imports. Does nothing in a process that has imported torch before.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    atexit.register(_prepare_exit)
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def freeze() -> None:
    """Exclude what is loaded from garbage collection: a full collection would stop all requests for 0.3 s."""
    gc.collect()
    gc.freeze()


def _prepare_exit() -> None:
    """Let the interpreter free everything in one collection. Libraries report objects that stay frozen as leaks."""
    gc.disable()
    gc.unfreeze()
