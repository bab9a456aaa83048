"""Intervals of few examples are as wide as Student's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from masquerade.evaluate.bootstrap import interval, mean_interval, median_interval, ratio_interval

STUDENT = {
    2: 12.706,
    3: 4.3027,
    5: 2.7764,
    7: 2.4469,
    8: 2.3646,
    16: 2.1314,
    64: 1.9983,
}  # 97.5 % quantiles for n - 1 degrees of freedom


@pytest.mark.parametrize("examples", STUDENT)
def test_the_interval_of_a_mean_is_as_wide_as_students(examples: int) -> None:
    """The mean width over many normal samples; of 8 examples, plain percentiles miss it by a fifth."""
    rng = np.random.default_rng(0)
    widths, wanted = [], []
    for _ in range(60):
        values = rng.normal(size=examples)
        low, high = mean_interval(values)
        widths.append(high - low)
        wanted.append(2 * STUDENT[examples] * values.std(ddof=1) / math.sqrt(examples))
    assert np.mean(widths) == pytest.approx(np.mean(wanted), rel=0.08)


@pytest.mark.parametrize("examples", [2, 3, 5, 8])
def test_what_has_no_effect_is_within_the_interval_in_19_of_20_cases(examples: int) -> None:
    rng = np.random.default_rng(1)
    ends = [mean_interval(rng.normal(size=examples), seed) for seed in range(400)]
    assert sum(low <= 0 <= high for low, high in ends) / len(ends) >= 0.92


@pytest.mark.parametrize("examples", [2, 4, 7, 16])
def test_a_ratio_of_sums_is_within_its_interval(examples: int) -> None:
    """Texts of different lengths, of which each token costs 0.1 nats on average."""
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(400):
        tokens = rng.integers(10, 60, examples).astype(float)
        loss = rng.normal(0.1 * tokens, np.sqrt(tokens))
        low, high = ratio_interval(np.zeros(examples), -loss, tokens, seed)
        hits += low <= math.exp(0.1) <= high
    assert hits / 400 >= 0.91


def test_a_single_example_says_nothing() -> None:
    assert mean_interval(np.array([0.3])) == (-math.inf, math.inf)
    assert median_interval(np.array([0.3])) == (-math.inf, math.inf)
    assert ratio_interval(np.zeros(1), np.ones(1), np.ones(1)) == (0.0, math.inf)


def test_an_interval_holds_its_figure_and_a_single_example_is_its_own() -> None:
    values = np.array([0.0, 0.1, 0.4, 0.5, 2.0, 9.0])
    low, high = median_interval(values)
    assert low <= np.median(values) <= high
    assert interval(lambda chosen: float(values[chosen].mean()), 1) == (0.0, 0.0)
