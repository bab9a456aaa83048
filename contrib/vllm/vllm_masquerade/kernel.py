"""y -= strength * x Pᵀ: what the pruned weights P of each row's slot contribute, as one operator of torch.

The operator has static shapes and reads slots and lists on the device, so a CUDA graph may hold it. On a CPU it is
`embedding_bag` for each mask of the batch; on a GPU it is one launch of a Triton kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATOR = "subtract_pruned"
_library = torch.library.Library("masquerade", "FRAGMENT")
_BLOCK = 64  # outputs of a program
_kernel: Any = None


def _subtract_cpu(
    y: Tensor, x: Tensor, slots: Tensor, bounds: Tensor, columns: Tensor, values: Tensor, strengths: Tensor
) -> None:
    slots = slots[: len(x)]
    for slot in slots.unique().tolist():
        if slot < 0 or not (pruned := int(bounds[slot, -1])):
            continue  # rows of the base keep every bit
        rows = torch.nonzero(slots == slot).squeeze(1)
        channels = x[rows].float().T.contiguous()  # [in, n]
        sums = F.embedding_bag(
            columns[slot, :pruned],
            channels,
            bounds[slot],
            mode="sum",
            per_sample_weights=values[slot, :pruned].float(),
            include_last_offset=True,
        )  # [out, n]
        y[rows] = (y[rows].float() - strengths[slot] * sums.T).to(y.dtype)


def subtract_triton(
    y: Tensor, x: Tensor, slots: Tensor, bounds: Tensor, columns: Tensor, values: Tensor, strengths: Tensor
) -> None:
    """The operator as a Triton kernel: a program has `_BLOCK` outputs of one row."""
    global _kernel
    if _kernel is None:
        _kernel = _make_kernel()
    (rows, out), room = y.shape, columns.shape[1]
    _kernel[(rows, -(-out // _BLOCK))](
        y, x, slots, bounds, columns, values, strengths, out, room, y.stride(0), x.stride(0), block=_BLOCK
    )


def _make_kernel() -> Any:
    """Compiled at the first use, as a CPU has no Triton."""
    from vllm_masquerade.triton_kernel import subtract

    return subtract


def _subtract_meta(*_: Tensor) -> None:
    """Nothing but y changes, and its shape stays."""


_library.define(
    f"{OPERATOR}(Tensor(a!) y, Tensor x, Tensor slots, Tensor bounds, Tensor columns, Tensor values, "
    "Tensor strengths) -> ()"
)
_library.impl(OPERATOR, _subtract_cpu, "CPU")
_library.impl(OPERATOR, subtract_triton, "CUDA")
_library.impl(OPERATOR, _subtract_meta, "Meta")


def subtract_pruned(
    y: Tensor, x: Tensor, slots: Tensor, bounds: Tensor, columns: Tensor, values: Tensor, strengths: Tensor
) -> None:
    """Correct the outputs y [rows, out] of the inputs x [rows, in] in place; both have unit stride in a row.

    slots int64 [rows or more] is the slot of each row, -1 for the base. Of each slot: bounds int32 [slots, out + 1] and
    columns int32 [slots, room] are its pruned weights as CSR, values [slots, room] what they are, strengths fp32
    [slots] is 1 - gamma. Sums are in fp32.
    """
    torch.ops.masquerade.subtract_pruned(y, x, slots, bounds, columns, values, strengths)
