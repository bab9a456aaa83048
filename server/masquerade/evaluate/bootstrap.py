"""How sure a figure is: percentile intervals from resampled examples.

Knows resampling. Refuses to know what the figures mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROUNDS = 1000
LEVEL = 0.95


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


def ratio_interval(base: Floats, worn: Floats, tokens: Floats, seed: int = 0) -> tuple[float, float]:
    """Of a perplexity ratio, from log-likelihoods (base, worn) and token counts an example."""
    gain = base - worn
    return interval(lambda chosen: float(np.exp(gain[chosen].sum() / tokens[chosen].sum())), len(gain), seed)
