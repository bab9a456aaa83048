"""Judges the states of a search on the tune split, and chooses the gamma of its mask."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from maskstore import Target
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.repetition import count_excess
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.pruning.tuning import Budgets, TuningTrial

# neutral and own perplexity with the mask over that without
STRENGTHS: Mapping[str, tuple[float, float]] = {"gentle": (1.02, 1.05), "normal": (1.05, 1.05), "strong": (1.15, 1.15)}
GAMMAS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # from the gentlest to the strongest

MOST_LOOPS = 0.05  # largest share of answers that may loop beyond the base's
ANSWERS = 32  # most prompts of the tune split that are answered, and as many neutral ones
ANSWER_TOKENS = 48  # most tokens of such an answer
TINY = 1e-4  # cost that is as good as none


class Draft(Protocol):
    """Makes treatments of targets that are not published."""

    def __call__(self, targets: Mapping[str, Target], *, gamma: float) -> Treatment:
        """The treatment with targets at a gamma, as the mask would be served."""


@dataclass(frozen=True)
class GammaChoice:
    """The chosen gamma, the reason, and what was tried."""

    gamma: float
    reason: str
    trials: tuple[TuningTrial, ...]
    refusal: tuple[str, ...] = ()  # why the mask must not be published


class StrengthTuner:
    """Measures the masks of one side within the budgets; `score` is what they were found by."""

    def __init__(
        self, eval_set: EvaluationSet, draft: Draft, side: int, limits: Budgets, score: str = "refined"
    ) -> None:
        self._eval_set, self._draft, self._side, self._limits = eval_set, draft, side, limits
        self._score = score

    def measure_base(self) -> Generator[None, None, None]:
        """Measure what masks are compared with, before the works of several sides each do so."""
        yield from self._eval_set.measure_base()
        yield from self._measure_looping(UNTREATED)

    def judge(self, targets: Mapping[str, Target], gamma: float) -> Generator[None, None, float]:
        """The shift that a mask can be expected to reach within the neutral budget at the gamma for it, nats a token.

        Effect grows with the step 1 - gamma and harm with its square, up to a step of 1.
        """
        trial = yield from self._measure(targets, self._draft(targets, gamma=gamma), gamma)
        allowed, found = self._limits.neutral - 1, max(trial.cost, TINY)
        scale = min(1 / (1 - gamma), math.sqrt(allowed / found))
        return _effect(trial) * scale - max(0.0, math.log(trial.own_ratio / self._limits.own))

    def choose_gamma(self, targets: Mapping[str, Target], start: float) -> Generator[None, None, GammaChoice]:
        """The gamma of largest shift of those within the budgets; tried from `start` on, in order.

        At most the share `MOST_LOOPS` of its answers loop beyond the base's. If there is no such gamma, it is the
        gentlest that was tried. The mask is refused if not even that is within the budgets.
        """
        place = min(range(len(GAMMAS)), key=lambda index: abs(GAMMAS[index] - start))
        trials = [(yield from self._try(targets, GAMMAS[place]))]
        if self._accepts(trials[0]):
            for gamma in GAMMAS[place + 1 :]:
                trials.append((yield from self._try(targets, gamma)))
                if not self._accepts(trials[-1]):
                    break
        else:
            for gamma in reversed(GAMMAS[:place]):
                trials.append((yield from self._try(targets, gamma)))
                if self._accepts(trials[-1]):
                    break
        within = [trial for trial in trials if trial.within(self._limits)]
        kept = [trial for trial in within if self._accepts(trial)]
        best = max(kept, key=_effect) if kept else trials[-1]
        why = "largest shift within the budgets" if kept else "the gentlest that was tried"
        return GammaChoice(best.gamma, f"{why}: {best}", tuple(trials), () if within else (self._explain(trials),))

    def _explain(self, trials: Sequence[TuningTrial]) -> str:
        return f"no gamma keeps perplexity {self._limits}: {', '.join(map(str, trials))}"

    def _accepts(self, trial: TuningTrial) -> bool:
        return trial.within(self._limits) and trial.loops <= MOST_LOOPS

    def _try(self, targets: Mapping[str, Target], gamma: float) -> Generator[None, None, TuningTrial]:
        """The figures of a mask at a gamma; with loops, if it is within the budgets without them."""
        treatment = self._draft(targets, gamma=gamma)
        trial = yield from self._measure(targets, treatment, gamma)
        if not trial.within(self._limits):
            return trial
        before = yield from self._measure_looping(UNTREATED)
        looping = yield from self._measure_looping(treatment)
        return replace(trial, loops=count_excess(looping, before))

    def _measure_looping(self, treatment: Treatment) -> Generator[None, None, float]:
        return (yield from self._eval_set.measure_looping(treatment, ANSWERS, ANSWER_TOKENS))

    def _measure(
        self, targets: Mapping[str, Target], treatment: Treatment, gamma: float
    ) -> Generator[None, None, TuningTrial]:
        """The figures of a mask at a gamma."""
        base = yield from self._eval_set.measure_base()
        masked = yield from self._eval_set.measure(treatment)
        found = self._eval_set.figures(self._side, base, masked)
        own = math.inf if found["own_ratio"] is None else found["own_ratio"]
        neutral = math.inf if found["neutral_ratio"] is None else found["neutral_ratio"]
        return TuningTrial(self._score, _share(targets), own, neutral, found.get("margin_shift_median"), None, gamma)


def _share(targets: Mapping[str, Target]) -> float:
    """The share of all weights that is pruned."""
    pruned = sum(target.pruned for target in targets.values())
    return pruned / max(1, sum(math.prod(target.shape) for target in targets.values()))


def _effect(trial: TuningTrial) -> float:
    """The shift; without pairs to measure it with, by how much the persona's text gets likelier, nats a token."""
    return -math.log(trial.own_ratio) if trial.shift is None else trial.shift
