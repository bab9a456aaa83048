"""Count, mean and squared deviations of vectors in fp64, merged over parts of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of `count` vectors; `deviations` is the sum of squared differences from the mean. fp64 [channels]."""

    count: int
    mean: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Self:
        """The moments of the rows of [n, channels], n >= 1, computed in two passes."""
        mean = vectors.mean(0)
        return cls(len(vectors), mean.double(), (vectors - mean).square().sum(0).double())

    @classmethod
    def from_sums(cls, count: int, total: Tensor, squares: Tensor) -> Self:
        """The moments of `count` vectors with this sum and sum of squares.

        Mean and root mean square are exact. The variance is inexact if it is far smaller than the mean's square.
        """
        mean = total.double() / count
        return cls(count, mean, (squares.double() - count * mean.square()).clamp(min=0))

    def merge(self, other: Self) -> Self:
        """The moments of both data sets together: the pairwise update of Chan, Golub and LeVeque."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        deviations = self.deviations + other.deviations + gap.square() * (self.count * other.count / count)
        return type(self)(count, mean, deviations)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return replace(self, mean=self.mean.to(device), deviations=self.deviations.to(device))

    @property
    def variance(self) -> Tensor:
        """Population variance, fp64 [channels]."""
        return self.deviations / self.count

    @property
    def root_mean_square(self) -> Tensor:
        """fp64 [channels]."""
        return (self.variance + self.mean.square()).sqrt()
