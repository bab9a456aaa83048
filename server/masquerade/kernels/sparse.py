"""Sparse masks in torch: pruned weights in CSR form, gathered once when the mask is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskstore import Target
from masquerade.kernels.correction import Assignment, accumulator
from masquerade.kernels.weights import dense_weight


class SparseCorrection:
    """Keeps indices and a value for each pruned weight.

    The CSR product is `embedding_bag` over the input's channels: output channel o sums the rows `x[cols]` of its pruned
    weights, scaled by their values. Rows of x are independent, but the number of rows may change a sum's rounding.
    """

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        sparse = target.to_sparse()
        device, weight = linear.weight.device, dense_weight(linear)
        self.shape = target.shape
        self._indptr = torch.from_numpy(sparse.rows.astype(np.int64)).to(device)  # [out + 1]
        self.columns = torch.from_numpy(sparse.cols.astype(np.int64)).to(device)  # [pruned]
        self.rows = torch.repeat_interleave(self._indptr.diff())  # [pruned]
        self.values = weight[self.rows, self.columns].to(accumulator(weight.dtype))  # [pruned]

    @staticmethod
    def footprint(linear: nn.Linear, pruned: int) -> int:
        """The `nbytes` of a correction with `pruned` pruned weights."""
        weight = linear.weight
        value = accumulator(weight.dtype if weight.is_floating_point() else torch.float32).itemsize
        return 8 * (linear.out_features + 1) + (16 + value) * pruned

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return sum(tensor.nbytes for tensor in (self._indptr, self.columns, self.rows, self.values))

    @property
    def pruned(self) -> int:
        """Number of pruned weights."""
        return len(self.columns)

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out]."""
        channels = x.to(self.values.dtype).T.contiguous()  # [in, n]
        sums = F.embedding_bag(
            self.columns,
            channels,
            self._indptr,
            mode="sum",
            per_sample_weights=self.values,
            include_last_offset=True,
        )  # [out, n]
        return sums.T


class RowwiseCorrection:
    """The corrections of several masks, each for a few rows, as one gather and one scatter.

    For decode steps: one launch serves all personas of the batch, and its cost grows with pruned weights times rows.
    Make it once per composition of the batch and use it in every step until the composition changes.
    """

    def __init__(self, assignments: Sequence[Assignment[SparseCorrection]]) -> None:
        out, columns = assignments[0].correction.shape
        parts = [(part.correction, part.rows.unsqueeze(1), part.strength) for part in assignments]  # rows [n, 1]
        self._source = torch.cat([(rows * columns + sparse.columns).flatten() for sparse, rows, _ in parts])
        self._sink = torch.cat([(rows * out + sparse.rows).flatten() for sparse, rows, _ in parts])
        self._scale = torch.cat([(-strength * sparse.values).flatten() for sparse, _, strength in parts])

    def subtract(self, x: Tensor, y: Tensor) -> None:
        """Correct the outputs y [rows, out] of inputs x [rows, in] in place."""
        terms = x.reshape(-1).index_select(0, self._source) * self._scale  # in the accumulator's dtype
        if y.dtype == terms.dtype and y.is_contiguous():
            y.view(-1).scatter_add_(0, self._sink, terms)
        else:
            sums = terms.new_zeros(y.numel()).scatter_add_(0, self._sink, terms)
            y += sums.view(y.shape).to(y.dtype)
