"""Memory of the process, as the system counts it. Knows the C library; refuses to know what the memory was for."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def hand_back() -> None:
    """Give the system back what was freed. After work with tensors of many sizes, such as a build, the C library keeps
    what it may need again, and between what lives on there is more of it every time. Where it cannot be asked to,
    nothing happens.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
