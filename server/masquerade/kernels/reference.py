"""The slow reference backend: materialises the pruned weights in each call. Any device, dtype and density."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskstore import Target
from masquerade.kernels.correction import accumulator, bitmap_footprint
from masquerade.kernels.weights import dense_weight, share


class ReferenceCorrection:
    """Keeps one bit per weight, on a CPU in the mask's own memory; unpacks the layer in each call."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        self._linear = linear  # its weight is shared with the base
        self._keep = share(target.to_bitmap().keep).to(linear.weight.device)  # uint8 [out, bytes], LSB first

    footprint = staticmethod(bitmap_footprint)

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return self._keep.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out]."""
        dtype = accumulator(x.dtype)
        return F.linear(x.to(dtype), dense_weight(self._linear).to(dtype).masked_fill(self._kept(), 0))

    def _kept(self) -> Tensor:
        bits = torch.arange(8, dtype=torch.uint8, device=self._keep.device)
        kept = (self._keep.unsqueeze(-1) >> bits) & 1  # [out, bytes, 8]
        return kept.flatten(1)[:, : self._linear.in_features].bool()
