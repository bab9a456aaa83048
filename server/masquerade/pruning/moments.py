"""Count, mean and squared deviations of vectors, in fp64, from any split of the data.

Knows Welford's update and Chan's merge. Refuses to know what the vectors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Of `count` vectors: `mean` and `deviations` (sum of squared differences from the mean), fp64 [channels] each."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Self:
        """Of the rows of [n, channels], n >= 1, computed in two passes."""
        mean = vectors.mean(0)
        return cls(len(vectors), mean.double(), (vectors - mean).square().sum(0).double())

    @classmethod
    def from_sums(cls, count: int, total: Tensor, squares: Tensor) -> Self:
        """Of `count` vectors with this sum and sum of squares. Exact for mean and root mean square; the variance loses
        what is far smaller than the mean's square."""
        mean = total.double() / count
        return cls(count, mean, (squares.double() - count * mean.square()).clamp(min=0))

    def merge(self, other: Self) -> Self:
        """Of both data sets together: Chan, Golub and LeVeque's pairwise update, exact but for rounding."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        deviations = self.deviations + other.deviations + gap.square() * (self.count * other.count / count)
        return type(self)(count, mean, deviations)

    @property
    def variance(self) -> Tensor:
        """Of the population, fp64 [channels]."""
        return self.deviations / self.count

    @property
    def root_mean_square(self) -> Tensor:
        """fp64 [channels]."""
        return (self.variance + self.mean.square()).sqrt()

    def pack(self) -> dict[str, Tensor]:
        """Tensors that `unpack` reads."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "deviations": self.deviations}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What `pack` wrote."""
        return cls(int(tensors["count"]), tensors["mean"], tensors["deviations"])
