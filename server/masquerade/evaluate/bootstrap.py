"""95 % intervals: of means and ratios by the bootstrap, of shares by Wilson's score.

These two formulas are all that is needed of scipy.stats, which would be a dependency of 35 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROUNDS = 1000
LEVEL = 0.95
Z = 1.959964  # of the standard normal distribution, for `LEVEL`


def interval(
    figure: Callable[[NDArray[np.intp]], float], examples: int, seed: int = 0, rounds: int = ROUNDS
) -> tuple[float, float]:
    """The central `LEVEL` of a figure over resampled examples; `figure` takes the indices of a resample."""
    rng = np.random.default_rng(seed)
    values = [figure(rng.integers(0, examples, examples)) for _ in range(rounds)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return round(float(low), 4), round(float(high), 4)


def mean_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean of one value per example."""
    return interval(lambda chosen: float(values[chosen].mean()), len(values), seed)


def median_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """The interval of a median of one value per example."""
    return interval(lambda chosen: float(np.median(values[chosen])), len(values), seed)


def share_interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of a share, `of` at least 1.

    Unlike the bootstrap it stays wide for few examples: 4 of 4 give [0.51, 1], 16 of 16 give [0.81, 1].
    """
    share, spread = hits / of, Z * Z / of
    centre = (share + spread / 2) / (1 + spread)
    reach = Z * math.sqrt(share * (1 - share) / of + spread / of / 4) / (1 + spread)
    return round(max(0.0, centre - reach), 4), round(min(1.0, centre + reach), 4)


def ratio_interval(base: Floats, masked: Floats, tokens: Floats, seed: int = 0) -> tuple[float, float]:
    """The interval of a perplexity ratio, from each example's log-likelihoods (base, masked) and token count."""
    loss = base - masked
    return interval(lambda chosen: float(np.exp(loss[chosen].sum() / tokens[chosen].sum())), len(loss), seed)
