"""The layout of a batch for the kernels: fields of the address table, and tiles of rows with the same mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ROWS, COLUMNS, VALUES, KEEP = 0, 1, 2, 3  # fields of a table entry: addresses, 0 if absent
FIELDS = 4
NARROW = 2**16  # widest Linear whose column indices fit two bytes


@dataclass(frozen=True)
class Tiles:
    """Rows of a batch grouped by slot. The tensors may be written to between launches."""

    slots: Tensor  # slot of the table for each tile, int32 [tiles]; -1: no mask
    rows: Tensor  # int32 [tiles, width]; -1: padding


def tile(slots: NDArray[np.int32], width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Group rows by slot into tiles of up to `width` rows; returns slots [tiles] and rows [tiles, width]."""
    order = np.argsort(slots, kind="stable")
    sorted_slots = slots[order]
    is_first = np.ones(len(slots), bool)
    is_first[1:] = sorted_slots[1:] != sorted_slots[:-1]
    starts = np.flatnonzero(is_first)  # where each slot's rows start in the order
    rank = np.arange(len(slots)) - np.repeat(starts, np.diff(starts, append=len(slots)))  # among the slot's rows
    index = np.cumsum(rank % width == 0) - 1  # of the tile
    rows = np.full((index[-1] + 1 if len(slots) else 0, width), -1, np.int32)
    rows[index, rank % width] = order
    return slots[rows[:, 0]], rows
