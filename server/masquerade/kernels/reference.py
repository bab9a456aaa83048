"""The oracle: pruned weights are materialised for the product and dropped again. Any device, any dtype, any density.

Knows the plain formula. Refuses to be fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskstore import Target
from masquerade.kernels.correction import accumulator
from masquerade.kernels.weights import dense_weight, share


class ReferenceCorrection:
    """Keeps one bit a weight, on a CPU in the mask's own memory; unpacks the layer for each call."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        self._linear = linear  # its weight is shared with the base
        self._keep = share(target.to_bitmap().keep).to(linear.weight.device)  # uint8 [out, bytes], LSB first

    @staticmethod
    def footprint(linear: nn.Linear, _: int) -> int:
        """What `nbytes` will be, whatever is pruned."""
        return linear.out_features * 8 * -(-linear.in_features // 64)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return self._keep.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out]."""
        dtype = accumulator(x.dtype)
        return F.linear(x.to(dtype), dense_weight(self._linear).to(dtype).masked_fill(self._kept(), 0))

    def _kept(self) -> Tensor:
        bits = torch.arange(8, dtype=torch.uint8, device=self._keep.device)
        kept = (self._keep.unsqueeze(-1) >> bits) & 1  # [out, bytes, 8]
        return kept.flatten(1)[:, : self._linear.in_features].bool()
