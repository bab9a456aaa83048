"""How a batch is described to kernels: a table of addresses, and rows put together by what they wear.

Knows numbers of slots and rows. Refuses to know masks and requests, and needs no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ROWS, COLUMNS, VALUES, KEEP = 0, 1, 2, 3  # what a table says of a slot: addresses, 0 where there is nothing
FIELDS = 4
NARROW = 2**16  # columns up to here are two bytes


@dataclass(frozen=True)
class Tiles:
    """Rows of a batch, put together by slot. The tensors may be written to between launches."""

    slots: Tensor  # of the table, int32 [tiles]; -1 wears nothing
    rows: Tensor  # int32 [tiles, width]; -1 is no row


def tile(slots: NDArray[np.int32], width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Put rows, given their slots, into tiles of up to `width` rows of one slot: slots [tiles], rows [tiles, width]."""
    order = np.argsort(slots, kind="stable")
    sorted_slots = slots[order]
    fresh = np.ones(len(slots), bool)
    fresh[1:] = sorted_slots[1:] != sorted_slots[:-1]
    begins = np.flatnonzero(fresh)  # of each slot's rows in the order
    place = np.arange(len(slots)) - np.repeat(begins, np.diff(begins, append=len(slots)))  # among the slot's rows
    number = np.cumsum(place % width == 0) - 1
    rows = np.full((number[-1] + 1 if len(slots) else 0, width), -1, np.int32)
    rows[number, place % width] = order
    return slots[rows[:, 0]], rows
