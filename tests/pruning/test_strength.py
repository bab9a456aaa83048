"""The gamma of a searched mask: the strongest within the budgets."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from maskstore import encode
from masquerade.errors import InvalidValue
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.pruning import Recipe
from masquerade.pruning.strength import GAMMAS, STRENGTHS, StrengthTuner
from masquerade.pruning.tuning import Budgets


class Curve:
    """An evaluation set where effect is proportional to the step 1 - gamma, up to a point, and harm to its square."""

    def __init__(self, effect: float, harm: float, most: float = 1.0, own: float = 0.0, loops: float = 0.0) -> None:
        self._effect, self._harm, self._most, self._own, self._loops = effect, harm, most, own, loops
        self.tried: list[float] = []

    def measure_base(self) -> Generator[None, None, None]:
        yield

    def measure(self, treatment: Any) -> Generator[None, None, float]:
        yield
        self.tried.append(treatment.gamma)
        return 1 - float(treatment.gamma)

    def measure_looping(self, treatment: Any, *_: int) -> Generator[None, None, float]:
        yield
        return 0.15 + (0.0 if treatment is UNTREATED else self._loops * (1 - float(treatment.gamma)))

    def figures(self, _: int, __: None, step: float) -> dict[str, Any]:
        return {
            "own_ratio": 1 + self._own * step,
            "neutral_ratio": 1 + self._harm * step**2,
            "margin_shift_median": self._effect * min(step, self._most),
        }


class _Applied(Treatment):
    gamma: float


def draft(_: Any, *, gamma: float) -> Treatment:
    treatment = object.__new__(_Applied)
    treatment.__dict__ |= vars(UNTREATED) | {"gamma": gamma}
    return treatment


def choose(curve: Curve, limits: Budgets, start: float = 0.5) -> Any:
    return finish(StrengthTuner(curve, draft, 1, limits).choose_gamma(TARGETS, start))  # type: ignore[arg-type]


TARGETS = {"one of a thousand": encode(np.arange(1000).reshape(10, 100) == 7)}
NORMAL = Budgets(1.05, 1.05, 0.95)


@pytest.mark.parametrize(
    ("harm", "gamma"),
    [
        (0.01, 0.0),  # even the full mask is cheap
        (0.1, 0.3),  # 0.1 x 0.7 squared is 0.049
        (0.25, 0.6),  # the start is beyond the budget
        (4.0, 0.9),
    ],
)
def test_the_strongest_gamma_within_the_budgets_is_chosen(harm: float, gamma: float) -> None:
    assert choose(Curve(1.0, harm), NORMAL).gamma == gamma


def test_no_stronger_gamma_is_tried_than_the_first_beyond_a_budget() -> None:
    curve = Curve(1.0, 0.12)
    assert choose(curve, NORMAL).gamma == 0.4
    assert min(curve.tried) == 0.3


def test_a_step_that_shifts_no_more_is_not_taken() -> None:
    assert choose(Curve(1.0, 0.001, most=0.6), NORMAL).gamma == 0.4


def test_the_own_budget_counts_too() -> None:
    assert choose(Curve(1.0, 0.001, own=0.1), NORMAL).gamma == 0.5


def test_answers_may_not_loop_more_often_than_the_bases() -> None:
    assert choose(Curve(1.0, 0.001, loops=0.2), NORMAL).gamma == 0.8
    assert choose(Curve(1.0, 0.001, loops=0.05), NORMAL).gamma == 0.0  # 0.2 - 0.15 is more than 0.05 in floats
    assert choose(Curve(1.0, 0.001, loops=-0.2), NORMAL).gamma == 0.0
    assert choose(Curve(1.0, 0.001, loops=2.0), NORMAL).gamma == 0.9


def test_without_a_gamma_within_the_budgets_the_gentlest_is_refused() -> None:
    choice = choose(Curve(1.0, 40.0), NORMAL)
    assert choice.gamma == GAMMAS[0]
    (reason,) = choice.refusal
    assert re.search(r"no gamma keeps .* refined 0\.001 at gamma 0\.9 ", reason)
    assert choose(Curve(1.0, 0.1), NORMAL).refusal == ()


def test_states_are_judged_by_what_they_reach_within_the_budget() -> None:
    """A state with twice the effect at eight times the harm reaches less."""
    judged = [
        finish(StrengthTuner(curve, draft, 1, NORMAL).judge(TARGETS, 0.5))  # type: ignore[arg-type]
        for curve in (Curve(1.0, 0.2), Curve(2.0, 1.6))
    ]
    assert judged[0] > judged[1]
    cheap = finish(StrengthTuner(Curve(1.0, 1e-6), draft, 1, NORMAL).judge(TARGETS, 0.5))  # type: ignore[arg-type]
    assert cheap == pytest.approx(1.0)  # at gamma 0, and no further


def test_a_strength_is_a_pair_of_budgets_that_can_be_overridden() -> None:
    assert {name: pair[0] for name, pair in STRENGTHS.items()} == {"gentle": 1.02, "normal": 1.05, "strong": 1.15}
    assert Recipe().limits.neutral == 1.05
    assert Recipe(strength="strong").limits.neutral == 1.15
    limits = Recipe(strength="gentle", neutral_budget=1.3).limits
    assert (limits.neutral, limits.own) == (1.3, 1.05)
    with pytest.raises(InvalidValue, match="strength 'brutal' is unknown; there are gentle, normal, strong"):
        Recipe(strength="brutal")
