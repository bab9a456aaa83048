"""What calibration text shows about one Linear: all that a score may read beside the weight.

Knows which statistics there are, and whose they are. Refuses to know how they were collected and what is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

from masquerade.pruning.moments import Moments

Kind = Literal["channels", "hessian", "gradient", "fisher"]


@dataclass(frozen=True, eq=False)
class Channels:
    """Moments of a Linear's inputs, each [in]."""

    magnitudes: Moments  # |x| over the counted positions
    sequences: Moments  # root mean square of x over an example's counted positions, over examples

    def merge(self, other: Self) -> Self:
        """Of both data sets together."""
        return type(self)(self.magnitudes.merge(other.magnitudes), self.sequences.merge(other.sequences))

    @property
    def norm(self) -> Tensor:
        """Root mean square of every input channel over the counted positions, fp32 [in]: Wanda's norm.

        The mean instead of the sum leaves the ranking as it is and does not grow with the data.
        """
        return self.magnitudes.root_mean_square.float()


@dataclass(frozen=True, eq=False)
class Seen:
    """What one text shows. What was not asked for is None, and no score that needs it can be computed."""

    channels: Channels | None = None
    hessian: Tensor | None = None  # mean of x xᵀ over the counted positions, fp32 [in, in]
    gradient: Tensor | None = None  # d LL / dW, LL the mean log-likelihood of a counted token, fp32 [out, in]
    fisher: Tensor | None = None  # mean over counted tokens of the squared gradient by position, fp32 [out, in]


NOTHING = Seen()


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the persona's text, its opposite's and neutral text show about one Linear."""

    own: Seen
    contrast: Seen = NOTHING
    neutral: Seen = NOTHING

    def swapped(self) -> Self:
        """The same, as the opposite sees it."""
        return replace(self, own=self.contrast, contrast=self.own)


def given(value: Tensor | None) -> Tensor:
    """A statistic that a score declared to need."""
    assert value is not None
    return value


def channels(seen: Seen) -> Channels:
    """The channels of a text whose score declared to need them."""
    assert seen.channels is not None
    return seen.channels
