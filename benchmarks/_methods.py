"""Masks of several methods from one calibration, and what each does. Knows walks, ladders and panels put together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, Target
from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, batches
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.panel import Panel, Reading
from masquerade.evaluate.treatment import Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_targets
from masquerade.pruning.evidence import Evidence, Kind
from masquerade.pruning.ladder import Ladder, ScorePlan
from masquerade.pruning.scores import SCORES, Choices
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.walk import CalibrationText, Role, Walk, layer_number


def calibrate(
    base: Base,
    plans: Sequence[ScorePlan],
    said: Mapping[Role, Sequence[Encoded]],
    scratch: Scratch | None = None,
    tokens: int = BATCH_TOKENS,
    scoring: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Ladder:
    """The pruned sets of all plans for both sides, from one walk; `scoring` is around all that is no statistics."""
    scores = [SCORES[plan.score] for plan in plans]
    wanted: frozenset[Kind] = frozenset().union(*(score.needs for score in scores))
    needs: dict[Role, frozenset[Kind]] = {"own": wanted, "contrast": wanted, "neutral": wanted & {"fisher"}}
    texts = {
        role: CalibrationText(list(batches(said[role], base.device, tokens)), kinds)
        for role, kinds in needs.items()
        if kinds
    }
    targets = {name: linear for plan in plans for name, linear in find_targets(base.model, plan.scope).items()}
    kept = scratch or Scratch()
    walk, ladder = Walk(base, targets, texts, kept), Ladder(tuple(plans), (1, -1), Choices(), kept)

    def visit(stage: str, number: int, evidence: Mapping[str, Evidence]) -> Iterator[None]:
        with scoring():
            linears = {name: targets[name] for name in evidence}
            yield from ladder.climb(f"{stage}-{number}", stage == "backward", linears, evidence)

    for stage, go in (("forward", walk.forward), ("backward", walk.backward)):
        if stage == "forward" or any(score.backward for score in scores):
            for _ in go(partial(visit, stage)):
                pass
            with scoring():  # after the walk, as a build does: among its large temporaries they would cost more
                for number in {layer_number(name) for name in targets}:
                    ladder.load(f"{stage}-{number}")
    return ladder


def as_mask(base: Base, targets: Mapping[str, Target], **certificate: float) -> Mask:
    info = MaskInfo(persona="draft", score="draft", certificate=certificate)
    return Mask(MaskBase(base.fingerprint, base.name), targets, info)


def draft(base: Base, manager: MaskManager, targets: Mapping[str, Target], phase: Phase = "all") -> Treatment:
    return Treatment(applied=AppliedMask(manager.fit(as_mask(base, targets)), 0.0), phase=phase)


def summarise(panel: Panel, masked: Mapping[int, Reading]) -> dict[str, Any]:
    """Mean figures and intervals of both sides of an axis."""
    bare = finish(panel.bare())
    sides = [panel.figures(side, bare, masked[side], masked[-side]) for side in (1, -1)]
    ends = [panel.intervals(side, bare, masked[side], masked[-side]) for side in (1, -1)]
    found: dict[str, Any] = {
        name: sum(side[name] if side[name] is not None else float("inf") for side in sides) / 2
        for name in ("flip", "margin_shift", "own_ratio", "neutral_ratio")
    }
    found["intervals"] = {name: [sum(end[name][at] for end in ends) / 2 for at in (0, 1)] for name in found}
    found["accuracy"] = sum(side["preferred"]["masked"] - side["preferred"]["base"] for side in sides) / 2
    return found
