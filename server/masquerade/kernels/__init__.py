"""The masked product: backends for what a mask's pruned weights contribute to a Linear's output.

    y = x Wᵀ - (1 - gamma) x (W * (1 - M))ᵀ        (eq. 7 of arXiv 2602.07164, rearranged)

The first term is the unmodified base layer's. A `Correction` computes the second product for one Linear and one mask.
The native CPU kernels compute both terms in one pass over the weights: a `NativeProduct` holds a batch and serves all
Linears. The CUDA kernels do the same for bitmaps, and correct lists in one launch for the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeGuard

from torch import nn

from maskstore import Bitmap, Sparse, Target
from masquerade.kernels import cuda, native
from masquerade.kernels.attention import PagedChunks, attend_chunks, attends
from masquerade.kernels.correction import Assignment, Correction
from masquerade.kernels.cuda import CudaBits, CudaList
from masquerade.kernels.distributions import divergences, log_probabilities
from masquerade.kernels.gradients import differentiate, multiply_back, multiply_transposed, widen
from masquerade.kernels.layers import LayerParts, NativeLayers, PagedStep
from masquerade.kernels.native import (
    NativeBits,
    NativeList,
    NativeMask,
    NativeParts,
    NativeProduct,
    NativeSpan,
    dense,
    multiply_base,
)
from masquerade.kernels.quantised import QuantisedEmbedding, QuantisedLinear, QuantisedWeight
from masquerade.kernels.reference import ReferenceCorrection
from masquerade.kernels.rows import add_gains, attend, multiply_gate, normalize, rotate, serves_rows
from masquerade.kernels.sparse import RowwiseCorrection, SparseCorrection
from masquerade.kernels.weights import dense_tiles, dense_weight


class Backend(Protocol):
    """Makes the corrections of one kind."""

    def __call__(self, linear: nn.Linear, target: Target, /) -> Correction:
        """The correction of a Linear for a target, on the Linear's device."""

    def footprint(self, linear: nn.Linear, pruned: int, /) -> int:
        """The `nbytes` of a correction with `pruned` pruned weights."""


BACKENDS: Mapping[str, Backend] = {
    "reference": ReferenceCorrection,
    "sparse": SparseCorrection,
    "bits": NativeBits,
    "list": NativeList,
    "cuda-bits": CudaBits,
    "cuda-list": CudaList,
}
LISTED_UP_TO = 0.01  # largest pruned share at which a list is faster than bits on a CPU (docs/performance.md)


def serves(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the kernels compute a module's whole product, for any composition of the batch."""
    return native.serves(module) or cuda.serves(module)


def choose(linear: nn.Linear, kind: str, pruned: int, device: str | None = None) -> str:
    """The name in `BACKENDS` of a target's fastest backend; measured in docs/performance.md.

    `kind` is the target's (`bitmap` or `sparse`). `pruned` counts only if it is sparse. `device` is the type of the
    device where a Linear on torch's `meta` device is to be; by default the Linear is where it is.
    """
    if cuda.serves(linear, device):
        return "cuda-bits" if kind == Bitmap.kind else "cuda-list"
    if not native.serves(linear, device):
        return "reference" if kind == Bitmap.kind else "sparse"
    few = pruned <= LISTED_UP_TO * linear.in_features * linear.out_features
    return "list" if kind == Sparse.kind and few else "bits"


def correct(linear: nn.Linear, target: Target, backend: str | None = None) -> Correction:
    """The correction of a Linear for a target, on the Linear's device, by `backend` or else by the fastest."""
    if backend is None:
        backend = choose(linear, target.kind, target.pruned if isinstance(target, Sparse) else 0)
    return BACKENDS[backend](linear, target)


def footprint(linear: nn.Linear, kind: str, pruned: int, device: str | None = None) -> int:
    """The `nbytes` of the correction that `correct` would make, known without reading the mask; `device` as above."""
    return BACKENDS[choose(linear, kind, pruned, device)].footprint(linear, pruned)


__all__ = [
    "BACKENDS",
    "Assignment",
    "Correction",
    "LayerParts",
    "NativeLayers",
    "NativeMask",
    "NativeParts",
    "NativeProduct",
    "NativeSpan",
    "PagedChunks",
    "PagedStep",
    "QuantisedEmbedding",
    "QuantisedLinear",
    "QuantisedWeight",
    "RowwiseCorrection",
    "SparseCorrection",
    "add_gains",
    "attend",
    "attend_chunks",
    "attends",
    "choose",
    "correct",
    "dense",
    "dense_tiles",
    "dense_weight",
    "differentiate",
    "divergences",
    "footprint",
    "log_probabilities",
    "multiply_back",
    "multiply_base",
    "multiply_gate",
    "multiply_transposed",
    "normalize",
    "rotate",
    "serves",
    "serves_rows",
    "widen",
]
