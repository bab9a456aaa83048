"""What every backend of the masked product promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Correction(Protocol):
    """x (W * (1 - M))ᵀ for one Linear and one mask."""

    @property
    def nbytes(self) -> int:
        """Bytes held on the device, beside the base's weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to what the pruned weights add to their outputs, [n, out], in `accumulator(x.dtype)`."""


C = TypeVar("C", bound=Correction)


@dataclass(frozen=True)
class Assignment(Generic[C]):
    """Rows of a batch that a correction is for, each at its own strength."""

    correction: C
    rows: Tensor  # int64 [n]
    strength: Tensor  # 1 - gamma, fp32 [n, 1]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products of `dtype` are summed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
