"""95 % intervals: of means and ratios by the bootstrap, or Student's t for few examples; of shares by Wilson's score.

These formulas are all that is needed of scipy.stats, which would be a dependency of 35 MB.
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
# Student's t for `LEVEL`, by degrees of freedom from 1 on. Resamples of fewer examples than these know no tails: a
# percentile of their means cannot leave the range of the examples.
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)
FEW = len(STUDENT) + 1  # examples


def interval(
    figure: Callable[[NDArray[np.intp]], float], examples: int, seed: int = 0, rounds: int = ROUNDS
) -> tuple[float, float]:
    """The expanded percentile interval of a figure; `figure` takes the indices of a resample.

    Percentiles of resamples are too narrow for few examples: their spread is too small by sqrt(1 - 1/n), and their
    tails are the normal distribution's, not Student's. The percentiles are moved outwards by both (Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015, section 4.3). Of a single example the interval is its figure.
    """
    rng = np.random.default_rng(seed)
    values = [figure(rng.integers(0, examples, examples)) for _ in range(rounds)]
    tail = _find_tail(examples)
    low, high = np.quantile(values, [tail, 1 - tail])
    return round(float(low), 4), round(float(high), 4)


def _find_tail(examples: int) -> float:
    """The share of resamples below an interval: Phi(-sqrt(n / (n - 1)) t), which tends to 0.025.

    Student's t for n - 1 degrees of freedom by the expansion of Cornish and Fisher, within 1 % from 4 examples on.
    """
    free = max(1, examples - 1)
    terms = (
        Z,
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    student = sum(term / free**power for power, term in enumerate(terms))
    return math.erfc(student * math.sqrt((free + 1) / free) / math.sqrt(2)) / 2


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def mean_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean of one value per example; unbounded for a single one."""
    if len(values) <= FEW:
        return _of_few(float(values.mean()), values - values.mean(), lambda value: value)
    return interval(lambda chosen: float(values[chosen].mean()), len(values), seed)


def median_interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """The interval of a median of one value per example; of few, the range of the values, and at least the mean's."""
    if len(values) <= FEW:
        low, high = mean_interval(values)
        return min(low, round(float(values.min()), 4)), max(high, round(float(values.max()), 4))
    return interval(lambda chosen: float(np.median(values[chosen])), len(values), seed)


def _of_few(mean: float, residuals: Floats, scale: Callable[[float], float]) -> tuple[float, float]:
    """Student's interval, on a scale; unbounded for one example, which has no spread."""
    examples = len(residuals)
    spread = float(residuals.std(ddof=1)) / math.sqrt(examples) if examples > 1 else math.inf
    reach = STUDENT[max(0, examples - 2)] * spread
    return round(scale(mean - reach), 4), round(scale(mean + reach), 4)


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
    if len(loss) <= FEW:  # of a ratio of sums, linear in the examples
        ratio = float(loss.sum() / tokens.sum())
        return _of_few(ratio, (loss - ratio * tokens) / tokens.mean(), _exponential)
    return interval(lambda chosen: float(np.exp(loss[chosen].sum() / tokens[chosen].sum())), len(loss), seed)
