"""The resident memory of the process."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim_heap() -> None:
    """Return freed memory to the system, where the C library can.

    After work with tensors of many sizes, such as a build, glibc keeps freed memory, and fragmentation makes it grow.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
