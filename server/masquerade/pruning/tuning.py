"""Which score, how much of it, and when to wear it: decided on the tune split.

Knows the rule: of the values of rho within the budgets that which shifts most, the largest as a rule, and none beyond
that which is enough. Refuses to know the text on which the result is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskstore import Target
from masquerade.errors import BuildFailed
from masquerade.evaluate.panel import Panel, Reading
from masquerade.evaluate.treatment import Phase, Treatment
from masquerade.pruning.ladder import Ladder, ScorePlan

PATIENCE = 2  # rungs beyond the budget after which larger ones are not tried
EQUAL = 0.005  # neutral costs that differ less are equal
KEPT = 0.97  # share of the effect that phase `decode` must keep to be the default

Draft = Callable[[Mapping[str, Target], Phase], Treatment]
Items = Generator[None, None, None]


@dataclass(frozen=True)
class Budgets:
    """What a mask may cost, and how much effect is enough."""

    neutral: float  # most that it may multiply the perplexity of neutral text with
    own: float  # ... and of the persona's own text
    effect: float  # share of flipped prompts from which a larger rho is not looked for
    forced: bool  # take the smallest rho even if it is beyond the budgets


@dataclass(frozen=True)
class TuningTrial:
    """What a rung does on the tune split: the worst cost and the mean effect over the personas that are built."""

    score: str
    rho: float
    own_ratio: float
    neutral_ratio: float | None
    shift: float | None  # nats a token
    flip: float | None

    @property
    def cost(self) -> float:
        """What neutral text pays, or the persona's own where there is none."""
        return (self.own_ratio if self.neutral_ratio is None else self.neutral_ratio) - 1

    def within(self, limits: Budgets) -> bool:
        """Whether both budgets are kept."""
        return self.own_ratio <= limits.own and (self.neutral_ratio or 0.0) <= limits.neutral

    def __str__(self) -> str:
        figures = [f"own x{self.own_ratio:.3f}"]
        figures += [f"neutral x{self.neutral_ratio:.3f}"] if self.neutral_ratio is not None else []
        figures += [f"shift {self.shift:.3f}"] if self.shift is not None else []
        return f"{self.score} {self.rho:g} ({', '.join(figures)})"

    def enough(self, limits: Budgets) -> bool:
        """Whether the effect is reached."""
        return self.flip is not None and self.flip >= limits.effect


@dataclass(frozen=True)
class TuningChoice:
    """The score and the rho, and why."""

    score: str
    rho: float
    reason: str
    trials: Sequence[TuningTrial] = ()


class Tuner:
    """Tries rungs of a ladder on a panel. `sides` are those that are built, `draft` makes targets wearable."""

    def __init__(
        self, panel: Panel, ladder: Ladder, draft: Draft, sides: Sequence[int], limits: Budgets, opposed: bool
    ) -> None:
        self._panel, self._ladder, self._draft = panel, ladder, draft
        self._sides, self._limits = sides, limits
        self._worn = (1, -1) if opposed else (1,)
        self._readings: dict[tuple[str, float, Phase], dict[int, Reading]] = {}

    def choose(self, plans: Sequence[ScorePlan]) -> Generator[None, None, TuningChoice]:
        """The best plan and its rho. Raises `BuildFailed` if no rung of any plan keeps the budgets."""
        if len(plans) == 1 and len(plans[0].rhos) == 1:
            return TuningChoice(plans[0].score, plans[0].rhos[0], "given")
        trials: list[TuningTrial] = []
        winners: list[TuningTrial] = []
        for plan in plans:
            tried: list[TuningTrial] = []
            yield from self._search(plan, tried)
            trials += tried
            winners += sorted((one for one in tried if one.within(self._limits)), key=_effect)[-1:]
        if not winners and self._limits.forced:
            winners = [min(trials, key=lambda trial: trial.rho)]
        if not winners:
            raise BuildFailed(self._explain(trials))
        best, reason = _prefer(winners, self._limits)
        return TuningChoice(best.score, best.rho, reason, trials)

    def choose_phase(self, rung: TuningChoice) -> Generator[None, None, tuple[Phase, str]]:
        """`decode` when it keeps `KEPT` of the effect that the mask has when it is always worn."""
        bare = yield from self._panel.bare()
        effects: dict[Phase, tuple[float, float]] = {}
        phases: tuple[Phase, ...] = ("all", "decode")
        for phase in phases:
            worn = yield from self._read(rung.score, rung.rho, phase)
            trial = self._judge(rung.score, rung.rho, bare, worn)
            if trial.shift is None:
                return "all", "without a contrast there is no effect to compare"
            effects[phase] = (trial.flip or 0.0, trial.shift)
        kind, unit = (0, "flips") if effects["all"][0] > 0 else (1, "nats a token")
        whole, part = effects["all"][kind], effects["decode"][kind]
        keeps = part >= KEPT * whole
        return "decode" if keeps else "all", f"decode reaches {part:.3f} {unit}, all {whole:.3f}"

    def _search(self, plan: ScorePlan, tried: list[TuningTrial]) -> Items:
        bare = yield from self._panel.bare()
        beyond = 0
        for rho in plan.rhos:
            worn = yield from self._read(plan.score, rho, "all")
            trial = self._judge(plan.score, rho, bare, worn)
            tried.append(trial)
            beyond = 0 if trial.within(self._limits) else beyond + 1
            if beyond == PATIENCE or (not beyond and trial.enough(self._limits)):
                break
        for rho in plan.least:
            if any(trial.within(self._limits) for trial in tried):
                return
            worn = yield from self._read(plan.score, rho, "all")
            tried.append(self._judge(plan.score, rho, bare, worn))

    def _read(self, score: str, rho: float, phase: Phase) -> Generator[None, None, dict[int, Reading]]:
        """What a rung's masks do; measured once."""
        worn = self._readings.setdefault((score, rho, phase), {})
        for side in self._worn:
            if side not in worn:
                treatment = self._draft(self._ladder.targets((score, side, rho)), phase)
                worn[side] = yield from self._panel.read(treatment)
        return worn

    def _judge(self, score: str, rho: float, bare: Reading, worn: Mapping[int, Reading]) -> TuningTrial:
        figures = [self._panel.figures(side, bare, worn[side], worn.get(-side)) for side in self._sides]

        def collect(name: str) -> list[Any]:
            return [_finite(one[name]) for one in figures if name in one]

        neutral, shifts, flips = collect("neutral_ratio"), collect("margin_shift"), collect("flip")
        return TuningTrial(
            score,
            rho,
            max(collect("own_ratio")),
            max(neutral) if neutral else None,
            sum(shifts) / len(shifts) if shifts else None,
            sum(flips) / len(flips) if flips else None,
        )

    def _explain(self, trials: Sequence[TuningTrial]) -> str:
        return (
            f"no rho keeps perplexity within {self._limits.own} (own) and {self._limits.neutral} (neutral): "
            f"{', '.join(map(str, trials))}; give more examples, a smaller rho by hand, or larger budgets"
        )


def _prefer(winners: Sequence[TuningTrial], limits: Budgets) -> tuple[TuningTrial, str]:
    """Of those with enough effect, the cheapest, and of equally cheap ones the one with most; otherwise that with most.

    All of them keep the budgets, so effects are compared at equal neutral cost.
    """
    enough = [trial for trial in winners if trial.enough(limits)]
    if enough:
        best = min(enough, key=lambda trial: (round(trial.cost / EQUAL), -(trial.shift or 0.0)))
        why = f"reaches {best.flip:.3f} flips at the lowest neutral cost"
    else:
        best = max(winners, key=_effect)
        why = "largest shift within the budgets" if best.shift is not None else "largest rho within the budgets"
    rivals = [trial for trial in winners if trial is not best]
    return best, f"{why}: {best}" + (f"; against {', '.join(map(str, rivals))}" if rivals else "")


def _effect(trial: TuningTrial) -> tuple[float, float]:
    """What is compared within the budgets; how much is pruned, where no effect can be measured."""
    return trial.shift or 0.0, trial.rho


def _finite(value: float | None) -> float:
    return float("inf") if value is None else value
