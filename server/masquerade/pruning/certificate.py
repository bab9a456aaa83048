"""What a mask does to text that nothing was decided on, and whether it may be published.

Knows the figures that go into a mask's metadata and the rule for refusing. Refuses to know how the mask was found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy
import torch
import transformers

from maskstore import Mask, Target, diff
from masquerade import __version__
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.generation import Speech, answer
from masquerade.evaluate.metrics import read_divergence
from masquerade.evaluate.panel import Panel, rounded
from masquerade.evaluate.treatment import BARE, PHASES, Phase, Treatment
from masquerade.model import Base
from masquerade.pruning.tuning import Budgets

LIKELIER = 0.9  # a neutral ratio below it says that the base did not know the text to begin with
FEWEST_PAIRS = 16  # fewer held-out pairs tell too little: were all to flip, the interval would begin below 0.8
ANSWERS = 16  # most held-out prompts that are answered greedily, ...
ANSWER_TOKENS = 32  # ... and most tokens of an answer: how many of them a mask changes
MANY = 0.5  # a smaller share of changed answers is remarked upon
PASSED, REFUSED, TOO_FEW = "passed", "refused", "too few to tell"
SLACK = 2.0  # a figure beyond so many times the budget's allowance is refused however wide its interval


def judge(
    base: Base, panel: Panel, worn: Mapping[int, Mapping[Phase, Treatment]], phases: Mapping[int, Phase], seed: int
) -> Generator[None, None, dict[int, dict[str, Any]]]:
    """Figures by side: those of the default phase with intervals, those of both phases, KL from the base, and how many
    greedy answers are other than the base's.

    What follows the last item uses no model.
    """
    bare = yield from panel.bare()
    readings = {}
    for side, treatments in worn.items():
        for phase in PHASES:
            readings[side, phase] = yield from panel.read(treatments[phase])
    asked = _held_out_prompts(panel)
    said = yield from _answer(base, asked, BARE)
    measured: dict[int, dict[str, Any]] = {}
    for side, phase in phases.items():
        measured[side] = {}
        if panel.texts[0]:
            measured[side]["kl"] = yield from read_divergence(base, panel.texts[0], worn[side][phase])
        if asked:
            answers = yield from _answer(base, asked, worn[side][phase])
            changed = sum(now != before for now, before in zip(answers, said, strict=True))
            measured[side]["changed_answers"] = {"changed": changed, "of": len(asked), "share": changed / len(asked)}
    found: dict[int, dict[str, Any]] = {}
    for side, phase in phases.items():

        def both(at: Phase, side: int = side) -> tuple[Any, Any]:
            return readings[side, at], readings.get((-side, at))

        found[side] = panel.figures(side, bare, *both(phase)) | measured[side]
        found[side]["intervals"] = {
            name: list(ends) for name, ends in panel.intervals(side, bare, *both(phase), seed=seed).items()
        }
        found[side]["phases"] = {at: panel.figures(side, bare, *both(at)) for at in PHASES}
        found[side] = rounded(found[side])
    return found


def describe(targets: Mapping[str, Target]) -> dict[str, Any]:
    """How much is pruned, and where."""
    shares = {name: target.pruned / (target.shape[0] * target.shape[1]) for name, target in targets.items()}
    return {
        "pruned": sum(target.pruned for target in targets.values()),
        "pruned_share": {name: round(share, 6) for name, share in shares.items()},
    }


def compare(mask: Mask, opposite: Mask) -> dict[str, Any]:
    """How far a mask is from its opposite."""
    total = diff(mask, opposite).total
    return {"jaccard": round(total.jaccard, 6), "differing": round(total.differing, 6)}


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "masquerade": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def summarise(texts: Sequence[Encoded]) -> dict[str, Any]:
    """How much text there is, and its identity as the model reads it."""
    digest = hashlib.sha256(repr([(one.prompt, one.response) for one in texts]).encode()).hexdigest()
    return {"examples": len(texts), "tokens": sum(map(len, texts)), "digest": digest}


def conclude(found: Mapping[str, Any], limits: Budgets) -> dict[str, Any]:
    """The verdict on figures, why, and what else is to be said about them.

    `passed` is None where there are too few held-out pairs to tell.
    """
    reasons = object_to(found, limits)
    few = found.get("pairs", 0) < FEWEST_PAIRS
    verdict, passed = (REFUSED, False) if reasons else (TOO_FEW, None) if few else (PASSED, True)
    told = {"verdict": verdict, "passed": passed, "reasons": reasons, "forced": False}
    return told | {"remarks": remark({**found, **told}, limits)}


def remark(certificate: Mapping[str, Any], limits: Budgets) -> list[str]:
    """What a reader must know about figures that are no reason to refuse a mask."""
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


def object_to(certificate: Mapping[str, Any], limits: Budgets) -> list[str]:
    """Why a mask must not be published as it is; empty if it may.

    It does nothing if the interval of its shift reaches zero. It is past a budget if the figure is, and either its
    interval is too or it exceeds the allowance more than `SLACK` times.
    """
    intervals: Mapping[str, Sequence[float]] = certificate["intervals"]
    reasons = []
    if "margin_shift" in certificate and not intervals["margin_shift"][0] > 0:
        low, high = intervals["margin_shift"]
        reasons.append(f"no effect: it shifts margins by {certificate['margin_shift']} nats a token [{low}, {high}]")
    for name, budget in (("own_ratio", limits.own), ("neutral_ratio", limits.neutral)):
        if name not in certificate:
            continue
        value, low = (math.inf if figure is None else figure for figure in (certificate[name], intervals[name][0]))
        if value > budget and (low > budget or value - 1 > SLACK * (budget - 1)):
            kind = name.removesuffix("_ratio")
            reasons.append(f"too costly: {kind} perplexity x{value} [{low}, {intervals[name][1]}], budget x{budget}")
    return reasons


def _held_out_prompts(panel: Panel) -> list[Encoded]:
    """At most `ANSWERS` different ones, of either side. Plain text has none."""
    prompts = dict.fromkeys(one.prompt for side in (1, -1) for one in panel.texts[side] if len(one.prompt) > 1)
    return [Encoded(prompt, ()) for prompt in list(prompts)[:ANSWERS]]


def _answer(base: Base, asked: Sequence[Encoded], treatment: Treatment) -> Generator[None, None, list[str]]:
    """Greedy answers; an item a pass of the model."""
    said: list[str] = []
    for texts in answer(base, asked, treatment, Speech(ANSWER_TOKENS)):
        said += texts
        yield
    return said
