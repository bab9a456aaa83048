"""The Triton kernel of the operator; imported on a GPU, and by a test in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def subtract(y, x, slots, bounds, columns, values, strengths, out, room, y_row, x_row, block: tl.constexpr):
    """`block` outputs of one row; each lane walks through the list of its output."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        o = tl.program_id(1) * block + tl.arange(0, block)
        inside = o < out
        start = tl.load(bounds + slot * (out + 1) + o, mask=inside, other=0)
        stop = tl.load(bounds + slot * (out + 1) + o + 1, mask=inside, other=0)
        sums = tl.zeros((block,), tl.float32)
        for step in range(tl.max(stop - start)):
            listed = start + step < stop
            place = slot * room + start + step
            column = tl.load(columns + place, mask=listed, other=0)
            value = tl.load(values + place, mask=listed, other=0.0).to(tl.float32)
            sums += value * tl.load(x + row.to(tl.int64) * x_row + column, mask=listed, other=0.0).to(tl.float32)
        at = y + row.to(tl.int64) * y_row + o
        old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (old - tl.load(strengths + slot) * sums).to(y.dtype.element_ty), mask=inside)
