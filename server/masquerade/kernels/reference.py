"""The slow reference backend: materialises the pruned weights in each call, by tiles. Any device, dtype and density."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskstore import Target
from masquerade.kernels.correction import accumulator, bitmap_footprint
from masquerade.kernels.weights import dense_tiles, share


class ReferenceCorrection:
    """Keeps one bit per weight, on a CPU in the mask's own memory; unpacks the layer in each call, by tiles."""

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
        rows = x.to(dtype)
        parts = [
            F.linear(rows, weight.to(dtype).masked_fill(self._kept(begin, begin + len(weight)), 0))
            for begin, weight in dense_tiles(self._linear)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _kept(self, begin: int, end: int) -> Tensor:
        """Which weights of the rows `begin` to `end` are kept: bool [end - begin, in]."""
        bits = torch.arange(8, dtype=torch.uint8, device=self._keep.device)
        kept = (self._keep[begin:end].unsqueeze(-1) >> bits) & 1  # [rows, bytes, 8]
        return kept.flatten(1)[:, : self._linear.in_features].bool()
