"""How sure a figure is: 95 % intervals of means and ratios by the bootstrap, of shares by Wilson's score."""

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
    """The central `LEVEL` of a figure over resampled examples; `figure` gets the chosen examples' indices."""
    rng = np.random.default_rng(seed)
    values = [figure(rng.integers(0, examples, examples)) for _ in range(rounds)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return round(float(low), 4), round(float(high), 4)


def mean_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """Of the mean of one value an example."""
    return interval(lambda chosen: float(values[chosen].mean()), len(values), seed)


def share_interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's score interval of a share, `of` at least 1.

    Unlike resampling it knows that a few hits out of a few say little: 4 of 4 are [0.51, 1], 16 of 16 are [0.81, 1].
    """
    share, spread = hits / of, Z * Z / of
    centre = (share + spread / 2) / (1 + spread)
    reach = Z * math.sqrt(share * (1 - share) / of + spread / of / 4) / (1 + spread)
    return round(max(0.0, centre - reach), 4), round(min(1.0, centre + reach), 4)


def ratio_interval(base: Floats, worn: Floats, tokens: Floats, seed: int = 0) -> tuple[float, float]:
    """Of a perplexity ratio, from log-likelihoods (base, worn) and token counts an example."""
    gain = base - worn
    return interval(lambda chosen: float(np.exp(gain[chosen].sum() / tokens[chosen].sum())), len(gain), seed)
