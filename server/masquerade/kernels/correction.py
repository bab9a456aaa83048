"""The interface of every backend of the masked product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn


class Correction(Protocol):
    """x (W * (1 - M))ᵀ for one Linear and one mask."""

    @property
    def nbytes(self) -> int:
        """Device bytes, without the base's weights."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to the pruned weights' contribution [n, out], in `accumulator(x.dtype)`."""


C = TypeVar("C", bound=Correction)


@dataclass(frozen=True)
class Assignment(Generic[C]):
    """A correction and the rows of a batch that it applies to, each at its own strength."""

    correction: C
    rows: Tensor  # int64 [n]
    strength: Tensor  # 1 - gamma, fp32 [n, 1]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are summed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def bitmap_footprint(linear: nn.Linear, _: int) -> int:
    """Bytes of a Linear's bitmap (one bit per weight, rows padded to 64 bits), however many weights are pruned."""
    return linear.out_features * 8 * -(-linear.in_features // 64)
