"""Measures the certificate of an existing mask on held-out text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskstore import Mask
from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example, encode_fitting
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.treatment import Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from masquerade.pruning import certificate, neutral
from masquerade.pruning.certificate import CertifiedMask
from masquerade.pruning.progress import Work, track
from masquerade.pruning.recipe import Recipe

LEAST = 2  # fewest examples for an interval


@dataclass(frozen=True)
class ServedMask:
    """A mask and its default gamma."""

    mask: Mask
    gamma: float


@dataclass(frozen=True)
class HeldOutExamples:
    """Examples that the mask was not built from. Without neutral examples the base generates some, as in a build."""

    own: Sequence[Example]
    contrast: Sequence[Example] = ()
    neutral: Sequence[Example] = ()


def measure(
    base: Base,
    manager: MaskManager,
    persona: ServedMask,
    phase: Phase,
    held: HeldOutExamples,
    opposite: ServedMask | None = None,
    seed: int = 0,
) -> Work[tuple[dict[str, Any], dict[str, Any]]]:
    """The certificate, computed as in a build, and counts and digests of the examples it was measured on.

    `phase` is the default phase. Flips are measured if there are an opposite and contrast examples. The budgets are the
    defaults of `Recipe`. Raises `BadDataset` for fewer than `LEAST` examples that fit the base's context.
    """
    started = time.perf_counter()
    own, contrast, neutral_texts = (_encode(base, examples) for examples in (held.own, held.contrast, held.neutral))
    if len(own) < LEAST:
        raise BadDataset(
            f"{len(own)} of {len(held.own)} held-out examples fit the base's context; give at least {LEAST}"
        )
    neutral_texts = neutral_texts or (yield from track("neutral", neutral.generate_neutral_text(base, "report")))
    masks = {1: _certify(manager, persona, phase)}
    if opposite and contrast:
        masks[-1] = _certify(manager, opposite, phase)
    eval_set = EvaluationSet(base, own, contrast, neutral_texts)
    figures = yield from track("certify", certificate.measure_figures(base, eval_set, masks, (1,), seed))
    found = figures[1] | certificate.describe(persona.mask.targets)
    found |= certificate.conclude(found, Recipe().limits)
    if opposite:
        found["overlap"] = certificate.compare(persona.mask, opposite.mask)
    found |= {
        "phase": {"default": phase, "why": "the one it is served in"},
        "splits": {"report": len(own), "neutral": len(neutral_texts), "too_long_left_out": len(held.own) - len(own)},
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": certificate.versions(),
    }
    texts: Mapping[str, Sequence[Encoded]] = {"own": own, "contrast": contrast, "neutral": neutral_texts}
    return found, {name: certificate.summarise(text) for name, text in texts.items() if text}


def _encode(base: Base, examples: Sequence[Example]) -> list[Encoded]:
    """The examples that leave room for a response."""
    return [encoded for _, encoded in encode_fitting(base, examples)] if examples else []


def _certify(manager: MaskManager, served: ServedMask, phase: Phase) -> CertifiedMask:
    resident = manager.fit(served.mask)

    def apply(phase: Phase, gamma: float) -> Treatment:
        return Treatment(applied=AppliedMask(resident, gamma) if gamma < 1 else None, phase=phase)

    return CertifiedMask(apply, phase, served.gamma)
