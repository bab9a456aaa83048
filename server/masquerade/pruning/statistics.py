"""Calibration statistics of one Linear: what a score reads beside the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from masquerade.pruning.moments import Moments

Statistic = Literal["channels", "hessian", "gradient", "squared_gradient"]
Role = Literal["own", "contrast", "neutral"]


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Moments of a Linear's inputs, each [in]."""

    magnitudes: Moments  # |x| over the counted positions
    sequences: Moments  # root mean square of x over an example's counted positions, over examples

    def merge(self, other: Self) -> Self:
        """The statistics of both data sets together."""
        return type(self)(self.magnitudes.merge(other.magnitudes), self.sequences.merge(other.sequences))

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(self.magnitudes.to(device), self.sequences.to(device))

    @property
    def norm(self) -> Tensor:
        """Root mean square of every input channel over the counted positions, fp32 [in]: Wanda's norm.

        Wanda takes the root of the sum. The mean gives the same ranking and does not grow with the data.
        """
        return self.magnitudes.root_mean_square.float()


@dataclass(frozen=True, eq=False)
class TextStatistics:
    """The statistics of one text; those that no score needs are None.

    `squared_gradient` is the mean over counted tokens of g² x², with x the Linear's input at a position and g the
    gradient of the log-likelihood with respect to its output there. The diagonal empirical Fisher squares the gradient
    of a whole example, (Σ_t g_t x_t)², and so has the products of different positions too. The squared-gradient
    statistic leaves them out: it needs one matrix product per batch instead of a gradient per example.
    """

    channels: ChannelStatistics | None = None
    hessian: Tensor | None = None  # mean of x xᵀ over the counted positions, fp32 [in, in]
    gradient: Tensor | None = None  # d LL / dW, LL the mean log-likelihood of a counted token, fp32 [out, in]
    squared_gradient: Tensor | None = None  # fp32 [out, in]

    def merge(self, other: Self, share: float) -> Self:
        """The statistics of both texts together, of which the other one has this share of the counted tokens.

        A text without counted tokens has no statistics.
        """
        channels = self.channels or other.channels
        if self.channels and other.channels:
            channels = self.channels.merge(other.channels)
        return type(self)(
            channels,
            _mix(self.hessian, other.hessian, share),
            _mix(self.gradient, other.gradient, share),
            _mix(self.squared_gradient, other.squared_gradient, share),
        )

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(
            self.channels and self.channels.to(device),
            *(
                None if value is None else value.to(device)
                for value in (self.hessian, self.gradient, self.squared_gradient)
            ),
        )


NO_STATISTICS = TextStatistics()


@dataclass(frozen=True, eq=False)
class LinearStatistics:
    """The statistics of one Linear on the persona's text, on its opposite's and on neutral text."""

    own: TextStatistics
    contrast: TextStatistics = NO_STATISTICS
    neutral: TextStatistics = NO_STATISTICS

    def merge(self, other: Self, shares: Mapping[Role, float]) -> Self:
        """The statistics of both parts of the texts, of which the other part has these shares of the counted tokens."""
        return type(self)(
            self.own.merge(other.own, shares.get("own", 0)),
            self.contrast.merge(other.contrast, shares.get("contrast", 0)),
            self.neutral.merge(other.neutral, shares.get("neutral", 0)),
        )

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(self.own.to(device), self.contrast.to(device), self.neutral.to(device))

    def swapped(self) -> Self:
        """The statistics with own and contrast exchanged, for the opposite's mask."""
        return replace(self, own=self.contrast, contrast=self.own)


def required(value: Tensor | None) -> Tensor:
    """A statistic that is in the score's `needs`."""
    assert value is not None
    return value


def channels_of(text: TextStatistics) -> ChannelStatistics:
    """The channel statistics of a text, which are in the score's `needs`."""
    assert text.channels is not None
    return text.channels


def _mix(mine: Tensor | None, its: Tensor | None, share: float) -> Tensor | None:
    if mine is None or its is None:
        return its if mine is None else mine
    return mine.lerp(its, share)
