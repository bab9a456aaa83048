"""Chooses rho and the default phase on the tune split.

The rule: of the values of rho within the budgets, the one with the largest shift, which mostly is the largest; none
beyond the first with enough effect.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskstore import Target
from masquerade.errors import BuildFailed
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods
from masquerade.evaluate.treatment import PHASES, Phase, Treatment
from masquerade.pruning.candidates import CandidateMasks, ScorePlan

KEPT = 0.97  # share of the effect that phase `decode` must keep to be the default

Draft = Callable[[Mapping[str, Target], Phase], Treatment]


@dataclass(frozen=True)
class Budgets:
    """What a mask may cost, and what effect is enough."""

    neutral: float  # largest ratio of neutral text's perplexity to the base's
    own: float  # largest ratio of the persona's own text's perplexity to the base's
    effect: float  # share of flipped prompts that is enough: no larger rho is tried

    def __str__(self) -> str:
        return f"within {self.own} (own) and {self.neutral} (neutral)"


@dataclass(frozen=True)
class TuningTrial:
    """A candidate's figures on the tune split: the largest cost and the mean effect over the sides that are built."""

    score: str
    rho: float
    own_ratio: float
    neutral_ratio: float | None
    shift: float | None  # median over pairs, nats a token
    flip: float | None
    gamma: float = 0.0
    loops: float = 0.0  # by how much the share of greedy answers that loop exceeds the base's

    @property
    def cost(self) -> float:
        """Excess perplexity of neutral text, or of the persona's own if there is no neutral text."""
        return (self.own_ratio if self.neutral_ratio is None else self.neutral_ratio) - 1

    def within(self, limits: Budgets) -> bool:
        """Whether it is within both budgets."""
        return self.own_ratio <= limits.own and (self.neutral_ratio or 0.0) <= limits.neutral

    def __str__(self) -> str:
        figures = [f"own x{self.own_ratio:.3f}"]
        figures += [f"neutral x{self.neutral_ratio:.3f}"] if self.neutral_ratio is not None else []
        figures += [f"shift {self.shift:.3f}"] if self.shift is not None else []
        figures += [f"loops {self.loops:+.3f}"] if self.loops else []
        at = f" at gamma {self.gamma:g}" if self.gamma else ""
        return f"{self.score} {self.rho:g}{at} ({', '.join(figures)})"

    def enough(self, limits: Budgets) -> bool:
        """Whether it has enough effect."""
        return self.flip is not None and self.flip >= limits.effect


@dataclass(frozen=True)
class TuningChoice:
    """The chosen score and rho, the reason, and what was tried."""

    score: str
    rho: float
    reason: str
    trials: Sequence[TuningTrial] = ()
    refusal: Sequence[str] = ()  # why no mask may be published


class Tuner:
    """Tries candidates on an evaluation set.

    `sides` are those that get a mask, `draft` makes a treatment of targets, and `opposed` is whether flips are measured
    with the opposite's mask.
    """

    def __init__(
        self,
        eval_set: EvaluationSet,
        candidates: CandidateMasks,
        draft: Draft,
        sides: Sequence[int],
        limits: Budgets,
        opposed: bool,
    ) -> None:
        self._eval_set, self._candidates, self._draft = eval_set, candidates, draft
        self._sides, self._limits = sides, limits
        self._measured = (1, -1) if opposed else (1,)
        self._likelihoods: dict[tuple[str, float, Phase], dict[int, SetLikelihoods]] = {}

    def choose(self, plan: ScorePlan) -> Generator[None, None, TuningChoice]:
        """The best rho; if none is within the budgets, the smallest, and the masks are refused.

        Raises `BuildFailed` if no rho prunes any weight.
        """
        if len(plan.rhos) == 1:
            return TuningChoice(plan.score, plan.rhos[0], "given")
        trials = yield from self._try(plan)
        if not trials:
            raise BuildFailed(
                f"the score {plan.score!r} prunes no weight of Linears this small at any rho that it tries, up to "
                f"{plan.rhos[-1]:g}; give a larger rho"
            )
        kept = [trial for trial in trials if trial.within(self._limits)]
        if not kept:
            why = f"the smallest: {trials[0]}"
            return TuningChoice(plan.score, trials[0].rho, why, trials, (self._explain(trials),))
        best = max(kept, key=_effect)
        why = "largest shift" if best.shift is not None else "largest rho"
        if best.enough(self._limits):
            why = f"reaches {best.flip:.3f} flips"
        return TuningChoice(best.score, best.rho, f"{why} within the budgets: {best}", trials)

    def choose_phase(self, choice: TuningChoice) -> Generator[None, None, tuple[Phase, str]]:
        """The default phase, and why: `decode` if it keeps `KEPT` of the effect that phase `all` has."""
        base = yield from self._eval_set.measure_base()
        effects: dict[Phase, tuple[float, float]] = {}
        for phase in PHASES:
            masked = yield from self._measure(choice.score, choice.rho, phase)
            trial = self._make_trial(choice.score, choice.rho, base, masked)
            if trial.shift is None:
                return "all", "without a contrast there is no effect to compare"
            if phase == "decode" and not trial.within(self._limits):
                return "all", f"decode is beyond the budgets: {trial}"
            effects[phase] = (trial.flip or 0.0, trial.shift)
        kind, unit = (0, "flips") if effects["all"][0] > 0 else (1, "nats a token")
        whole, part = effects["all"][kind], effects["decode"][kind]
        keeps = part >= KEPT * whole
        return "decode" if keeps else "all", f"decode reaches {part:.3f} {unit}, all {whole:.3f}"

    def _try(self, plan: ScorePlan) -> Generator[None, None, list[TuningTrial]]:
        """Trials in ascending order of rho, and of cost, to the first beyond the budgets or with enough effect."""
        base = yield from self._eval_set.measure_base()
        tried: list[TuningTrial] = []
        for rho in plan.rhos:
            if not any(target.pruned for target in self._candidates.targets((plan.score, 1, rho)).values()):
                continue  # the Linears are too small for this share
            masked = yield from self._measure(plan.score, rho, "all")
            tried.append(self._make_trial(plan.score, rho, base, masked))
            if not tried[-1].within(self._limits) or tried[-1].enough(self._limits):
                break
        return tried

    def _measure(self, score: str, rho: float, phase: Phase) -> Generator[None, None, dict[int, SetLikelihoods]]:
        """The likelihoods under a candidate's masks, by side; measured once."""
        masked = self._likelihoods.setdefault((score, rho, phase), {})
        for side in self._measured:
            if side not in masked:
                treatment = self._draft(self._candidates.targets((score, side, rho)), phase)
                masked[side] = yield from self._eval_set.measure(treatment)
        return masked

    def _make_trial(
        self, score: str, rho: float, base: SetLikelihoods, masked: Mapping[int, SetLikelihoods]
    ) -> TuningTrial:
        figures = [self._eval_set.figures(side, base, masked[side], masked.get(-side)) for side in self._sides]

        def collect(name: str) -> list[Any]:
            return [_finite(one[name]) for one in figures if name in one]

        neutral, shifts, flips = collect("neutral_ratio"), collect("margin_shift_median"), collect("flip")
        return TuningTrial(
            score,
            rho,
            max(collect("own_ratio")),
            max(neutral) if neutral else None,
            sum(shifts) / len(shifts) if shifts else None,
            sum(flips) / len(flips) if flips else None,
        )

    def _explain(self, trials: Sequence[TuningTrial]) -> str:
        return f"no rho keeps perplexity {self._limits}: {', '.join(map(str, trials))}"


def _effect(trial: TuningTrial) -> tuple[float, float]:
    """Sort key: the shift, then rho, which decides alone if there are no pairs to measure a shift with."""
    return trial.shift or 0.0, trial.rho


def _finite(value: float | None) -> float:
    return float("inf") if value is None else value
