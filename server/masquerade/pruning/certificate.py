"""The certificate of a mask: its figures on text that decided nothing, and the rule for refusing it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy
import torch
import transformers

from maskstore import Mask, Target, diff
from masquerade import __version__
from masquerade.evaluate.bootstrap import FEW, STUDENT, Z
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods, rounded
from masquerade.evaluate.facts import Fact, check_facts, find_known_facts, read_facts
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import Items
from masquerade.evaluate.repetition import count_excess, share_looping
from masquerade.evaluate.treatment import PHASES, Phase, Treatment
from masquerade.model import Base
from masquerade.pruning.executor import Executor, SequentialExecutor
from masquerade.pruning.strength import MOST_LOOPS
from masquerade.pruning.tuning import Budgets

LIKELIER = 0.9  # at a smaller neutral ratio, the base models the text badly
FEWEST_PAIRS = 16  # with fewer pairs the interval begins below 0.8 even if all flip
ANSWERS = 16  # most held-out prompts that are answered greedily
ANSWER_TOKENS = 64  # most tokens of such an answer
CURVE = (0.9, 0.75, 0.5, 0.25, 0.0)  # gammas of the dose-response curve
CURVE_TEXTS = 32  # most texts of a kind that it is measured on
CURVE_FACTS = 16  # most known facts that it is measured on
MANY = 0.5  # a smaller share of changed answers gives a remark
PASSED, REFUSED, TOO_FEW = "passed", "refused", "too few to tell"
SLACK = 2.0  # a cost of more than this multiple of the budget's excess is refused, whatever its interval


@dataclass(frozen=True)
class CertifiedMask:
    """A mask to certify: how it is applied in a phase at a gamma, and its default phase and gamma."""

    apply: Callable[[Phase, float], Treatment]
    phase: Phase
    gamma: float

    def at(self, phase: Phase | None = None, gamma: float | None = None) -> Treatment:
        """The mask with its defaults for what is not given."""
        return self.apply(phase or self.phase, self.gamma if gamma is None else gamma)


def measure_figures(
    base: Base,
    eval_set: EvaluationSet,
    masks: Mapping[int, CertifiedMask],
    sides: Sequence[int],
    seed: int,
    executor: Executor | None = None,
) -> Generator[None, None, dict[int, dict[str, Any]]]:
    """Figures of the masks of `sides`: of the default phase with intervals, of both phases, of answers, and by gamma.

    `masks` may have the opposite's too, for flips. The `executor` runs the measurements of each mask. On a quantised
    base, the figures name the quantisation. The code after the last item uses no model.
    """
    untreated = yield from eval_set.measure_base()
    answers = yield from _Answers.of_base(base, eval_set.prompts(ANSWERS))
    measuring = {
        side: _measure_mask(base, eval_set, answers, side, mask, likelihoods_only=side not in sides)
        for side, mask in masks.items()
    }
    measured = yield from (executor or SequentialExecutor()).run(measuring)
    found = {}
    for side in sides:
        opposite = measured.get(-side)
        both = {
            phase: (of_phase, opposite.likelihoods[phase] if opposite else None)
            for phase, of_phase in measured[side].likelihoods.items()
        }
        default = masks[side].phase
        intervals = eval_set.intervals(side, untreated, *both[default], seed=seed)
        found[side] = rounded(
            eval_set.figures(side, untreated, *both[default])
            | measured[side].figures
            | {"intervals": {name: list(ends) for name, ends in intervals.items()}}
            | {"phases": {phase: eval_set.figures(side, untreated, *both[phase]) for phase in PHASES}}
        )
        if base.quantization:
            found[side]["quantization"] = base.quantization
    return found


@dataclass(frozen=True)
class _Measured:
    """What a mask makes of the held-out text, and the figures that need no other mask."""

    likelihoods: Mapping[Phase, SetLikelihoods]
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Answers:
    """The base's greedy answers to held-out prompts, and the facts that it knows."""

    prompts: Sequence[Encoded]
    texts: Sequence[str]
    facts: Sequence[Fact]
    known: Sequence[Fact]

    @classmethod
    def of_base(cls, base: Base, prompts: Sequence[Encoded]) -> Items[Self]:
        """Ask the base; a work item is a pass of the model."""
        texts = yield from write_answers(base, prompts, params=GenerationParams(ANSWER_TOKENS))
        facts = read_facts("report")
        right = yield from find_known_facts(base, facts)
        return cls(prompts, texts, facts, [fact for fact, is_right in zip(facts, right, strict=True) if is_right])

    def compare(self, base: Base, treatment: Treatment, kept: Sequence[bool]) -> Items[dict[str, Any]]:
        """How many answers a mask changes, how many repeat themselves, and how many of the known facts are `kept`."""
        facts = {"of": len(self.facts), "known": len(self.known), "kept": _share(kept)}
        found: dict[str, Any] = {"facts": facts}
        if not self.prompts:
            return found
        texts = yield from write_answers(base, self.prompts, treatment, GenerationParams(ANSWER_TOKENS))
        number = len(texts)
        changed = sum(new != old for new, old in zip(texts, self.texts, strict=True))
        return found | {
            "changed_answers": {"changed": changed, "of": number, "share": changed / number},
            "loops": {"masked": share_looping(texts), "base": share_looping(self.texts), "of": number},
        }


def _measure_mask(
    base: Base, eval_set: EvaluationSet, answers: _Answers, side: int, mask: CertifiedMask, *, likelihoods_only: bool
) -> Items[_Measured]:
    """Measure a mask, without what only its own certificate has if `likelihoods_only`."""
    likelihoods: dict[Phase, SetLikelihoods] = {}
    for phase in PHASES:
        likelihoods[phase] = yield from eval_set.measure(mask.at(phase))
    if likelihoods_only:
        return _Measured(likelihoods, {})
    found: dict[str, Any] = {}
    if eval_set.texts[0]:
        found["kl"] = yield from eval_set.measure_divergence(mask.at())
    kept = yield from check_facts(base, answers.known, mask.at())
    found |= yield from answers.compare(base, mask.at(), kept)
    default = _Point(likelihoods[mask.phase].first(CURVE_TEXTS), kept[:CURVE_FACTS])
    found["curve"] = yield from _measure_curve(base, eval_set, answers.known[:CURVE_FACTS], side, mask, default)
    return _Measured(likelihoods, found)


@dataclass(frozen=True)
class _Point:
    """What a mask makes at one gamma of the text that its curve is measured on, and which known facts it keeps."""

    likelihoods: SetLikelihoods
    kept: Sequence[bool]


def _measure_curve(
    base: Base, eval_set: EvaluationSet, known: Sequence[Fact], side: int, mask: CertifiedMask, default: _Point
) -> Items[list[dict[str, Any]]]:
    """Shift, costs and the share of known facts kept at each gamma of `CURVE`, in the default phase.

    `default` is what the mask makes of the same text at its own gamma.
    """
    part = eval_set.first(CURVE_TEXTS)
    untreated = (yield from eval_set.measure_base()).first(CURVE_TEXTS)
    points = []
    for gamma in CURVE:
        point = default
        if gamma != mask.gamma:
            treatment = mask.at(gamma=gamma)
            masked = yield from part.measure(treatment)
            point = _Point(masked, (yield from check_facts(base, known, treatment)))
        figures = part.figures(side, untreated, point.likelihoods)
        names = ("margin_shift_median", "own_ratio", "neutral_ratio")
        points.append(
            {"gamma": gamma}
            | {name: figures[name] for name in names if name in figures}
            | {"facts_kept": _share(point.kept)}
        )
    return points


def _share(kept: Sequence[bool]) -> float | None:
    return sum(kept) / len(kept) if kept else None


def describe(targets: Mapping[str, Target]) -> dict[str, Any]:
    """How many weights are pruned, and their share of each Linear."""
    shares = {name: target.pruned / (target.shape[0] * target.shape[1]) for name, target in targets.items()}
    return {
        "pruned": sum(target.pruned for target in targets.values()),
        "pruned_share": {name: round(share, 6) for name, share in shares.items()},
    }


def compare(mask: Mask, opposite: Mask) -> dict[str, Any]:
    """Jaccard index and differing share of a mask and its opposite."""
    total = diff(mask, opposite).total
    return {"jaccard": round(total.jaccard, 6), "differing": round(total.differing, 6)}


def versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on."""
    return {
        "masquerade": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def summarise(texts: Sequence[Encoded]) -> dict[str, Any]:
    """Number of examples and tokens, and a digest of the token ids."""
    digest = hashlib.sha256(repr([(one.prompt, one.response) for one in texts]).encode()).hexdigest()
    return {"examples": len(texts), "tokens": sum(map(len, texts)), "digest": digest}


def conclude(found: Mapping[str, Any], limits: Budgets, known: Sequence[str] = ()) -> dict[str, Any]:
    """The verdict on figures, with reasons and remarks; `known` are reasons to refuse the mask that others found.

    `passed` is None if there are too few held-out pairs.
    """
    reasons = [*known, *find_reasons(found, limits)]
    few = found.get("pairs", 0) < FEWEST_PAIRS
    verdict, passed = (REFUSED, False) if reasons else (TOO_FEW, None) if few else (PASSED, True)
    conclusion = {"verdict": verdict, "passed": passed, "reasons": reasons, "forced": False}
    return conclusion | {"remarks": remark({**found, **conclusion}, limits)}


def remark(certificate: Mapping[str, Any], limits: Budgets) -> list[str]:
    """Notes on the figures that are no reasons to refuse the mask."""
    remarks = []
    if "margin_shift" not in certificate:
        remarks.append("the effect was not measured: there are no two answers to the same prompt")
    elif certificate.get("verdict") == TOO_FEW:
        flips = certificate["intervals"].get("flip")
        between = f", which put flip between {flips[0]} and {flips[1]}" if flips else ""
        more = FEWEST_PAIRS - certificate["pairs"]
        remarks.append(f"{TOO_FEW}: {certificate['pairs']} held-out pairs{between}; {more} more are wanted")
    answers = certificate.get("changed_answers")
    if answers and answers["share"] < MANY:
        same = answers["of"] - answers["changed"]
        remarks.append(f"{same} of {answers['of']} greedy answers to held-out prompts are the base's, word for word")
    looping = certificate.get("loops")
    if looping and count_excess(looping["masked"], looping["base"]) > MOST_LOOPS:
        masked, base = (round(looping["of"] * looping[name]) for name in ("masked", "base"))
        remarks.append(f"{masked} of {looping['of']} greedy answers to held-out prompts loop, {base} of the base's")
    neutral = certificate.get("neutral_ratio")
    if neutral is not None and neutral < LIKELIER:
        remarks.append(
            f"neutral_ratio x{neutral} is no sign of health: the base does not know such text, so what the mask costs "
            "was not measured; give neutral text that the base is good at"
        )
    for name, budget in (("own_ratio", limits.own), ("neutral_ratio", limits.neutral)):
        value = certificate.get(name)
        if (
            value is not None
            and value > budget
            and not any(name.split("_")[0] in one for one in certificate["reasons"])
        ):
            low, high = certificate["intervals"][name]
            remarks.append(f"{name} x{value} is past the budget x{budget}, but its interval [{low}, {high}] is not")
    return remarks


def find_reasons(certificate: Mapping[str, Any], limits: Budgets) -> list[str]:
    """Reasons to refuse a mask; empty if it may be published.

    It has no effect if the interval of its shift reaches zero; of few pairs, whose interval is wide, if twice its
    standard error does. It is past a budget if its figure is, and if the whole
    interval is too or the excess is more than `SLACK` times the budget's.
    """
    intervals: Mapping[str, Sequence[float]] = certificate["intervals"]
    reasons = []
    shift = certificate.get("margin_shift")
    if "margin_shift" in certificate and not (_find_least_shift(certificate) or 0) > 0:  # None is not finite
        low, high = intervals["margin_shift"]
        pairs = "1 held-out pair" if certificate["pairs"] == 1 else f"{certificate['pairs']} held-out pairs"
        reasons.append(f"no effect: it shifts margins by {shift} nats a token [{low}, {high}], measured on {pairs}")
    for name, budget in (("own_ratio", limits.own), ("neutral_ratio", limits.neutral)):
        if name not in certificate:
            continue
        value, low = (math.inf if figure is None else figure for figure in (certificate[name], intervals[name][0]))
        if value > budget and (low > budget or value - 1 > SLACK * (budget - 1)):
            kind = name.removesuffix("_ratio")
            reasons.append(f"too costly: {kind} perplexity x{value} [{low}, {intervals[name][1]}], budget x{budget}")
    return reasons


def _find_least_shift(certificate: Mapping[str, Any]) -> float | None:
    """The end of the shift's interval, in which few pairs count as many: by Student's alone, hardly any two show an
    effect. Of one pair it is the shift.
    """
    shift: float | None = certificate["margin_shift"]
    least: float | None
    least, most = certificate["intervals"]["margin_shift"]
    pairs = certificate["pairs"]
    if pairs > FEW or shift is None:
        return least
    return shift if least is None or most is None else shift - (most - least) / 2 / STUDENT[pairs - 2] * Z
