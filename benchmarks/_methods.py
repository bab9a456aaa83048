"""Finds masks of several methods in one calibration, and summarises their figures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, Target
from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, batches
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_targets
from masquerade.pruning.candidates import CandidateKey, CandidateMasks, ScorePlan
from masquerade.pruning.collector import CalibrationText, StatisticsCollector
from masquerade.pruning.layerwise import layer_number
from masquerade.pruning.scores import SCORES, ScoreSettings
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import LinearStatistics, Role, Statistic


class Candidates:
    """Candidates of several scores, from one collection of statistics."""

    def __init__(self, plans: Sequence[ScorePlan], scratch: Scratch) -> None:
        self._by_score = {plan.score: CandidateMasks(plan, (1, -1), ScoreSettings(), scratch) for plan in plans}

    def score_layer(
        self, key: str, backward: bool, linears: Mapping[str, nn.Linear], statistics: Mapping[str, LinearStatistics]
    ) -> Iterator[int]:
        """Score a layer's Linears with every score that needs a backward pass, or with all others."""
        for score, candidates in self._by_score.items():
            yield from candidates.score_layer(f"{score}-{key}", backward, linears, statistics)

    def load(self, key: str) -> None:
        """Read what `score_layer` kept under a key."""
        for score, candidates in self._by_score.items():
            candidates.load(f"{score}-{key}")

    def targets(self, key: CandidateKey) -> dict[str, Target]:
        """The targets of a score, side and rho."""
        return self._by_score[key[0]].targets(key)


def calibrate(
    base: Base,
    plans: Sequence[ScorePlan],
    examples: Mapping[Role, Sequence[Encoded]],
    scratch: Scratch | None = None,
    tokens: int = BATCH_TOKENS,
    scoring: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Candidates:
    """Candidates of all plans for both sides, from one collection; `scoring` wraps all work beside the statistics."""
    scores = [SCORES[plan.score] for plan in plans]
    wanted: frozenset[Statistic] = frozenset().union(*(score.needs for score in scores))
    needs: dict[Role, frozenset[Statistic]] = {
        "own": wanted,
        "contrast": wanted,
        "neutral": wanted & {"squared_gradient"},
    }
    texts = {
        role: CalibrationText(list(batches(examples[role], base.device, tokens)), kinds)
        for role, kinds in needs.items()
        if kinds
    }
    targets = {name: linear for plan in plans for name, linear in find_targets(base.model, plan.scope).items()}
    kept = scratch or Scratch()
    collector, candidates = (
        StatisticsCollector(base, targets, texts, kept),
        Candidates(plans, kept),
    )

    def on_layer(stage: str, number: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[None]:
        with scoring():
            linears = {name: targets[name] for name in statistics}
            yield from candidates.score_layer(f"{stage}-{number}", stage == "backward", linears, statistics)

    for stage, run_pass in (("forward", collector.forward), ("backward", collector.backward)):
        if stage == "forward" or any(score.backward for score in scores):
            for _ in run_pass(partial(on_layer, stage)):
                pass
            with scoring():  # after the pass, as in a build
                for number in {layer_number(name) for name in targets}:
                    candidates.load(f"{stage}-{number}")
    return candidates


def as_mask(base: Base, targets: Mapping[str, Target], **certificate: float) -> Mask:
    info = MaskInfo(persona="draft", score="draft", certificate=certificate)
    return Mask(MaskBase(base.fingerprint, base.name), targets, info)


def draft(base: Base, manager: MaskManager, targets: Mapping[str, Target], phase: Phase = "all") -> Treatment:
    return Treatment(applied=AppliedMask(manager.fit(as_mask(base, targets)), 0.0), phase=phase)


def summarise(eval_set: EvaluationSet, masked: Mapping[int, SetLikelihoods]) -> dict[str, Any]:
    """Means of the figures and interval ends of both sides of an axis."""
    untreated = finish(eval_set.measure_base())
    sides = [eval_set.figures(side, untreated, masked[side], masked[-side]) for side in (1, -1)]
    ends = [eval_set.intervals(side, untreated, masked[side], masked[-side]) for side in (1, -1)]
    found: dict[str, Any] = {
        name: sum(side[name] if side[name] is not None else float("inf") for side in sides) / 2
        for name in ("flip", "margin_shift", "own_ratio", "neutral_ratio")
    }
    found["intervals"] = {name: [sum(end[name][at] for end in ends) / 2 for at in (0, 1)] for name in found}
    found["accuracy"] = sum(side["preferred"]["masked"] - side["preferred"]["base"] for side in sides) / 2
    return found
