"""Intervals of few examples are as wide as Student's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from masquerade.evaluate.bootstrap import interval, mean_interval, median_interval

STUDENT = {8: 2.3646, 16: 2.1314, 64: 1.9983}  # 97.5 % quantiles for n - 1 degrees of freedom


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


def test_what_has_no_effect_is_within_the_interval_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(1)
    ends = [mean_interval(rng.normal(size=8), seed) for seed in range(400)]
    assert sum(low <= 0 <= high for low, high in ends) / len(ends) >= 0.92


def test_an_interval_holds_its_figure_and_a_single_example_is_its_own() -> None:
    values = np.array([0.0, 0.1, 0.4, 0.5, 2.0, 9.0])
    low, high = median_interval(values)
    assert low <= np.median(values) <= high
    assert interval(lambda chosen: float(values[chosen].mean()), 1) == (0.0, 0.0)
