"""The certificate of a mask that exists already, measured anew on held-out text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskstore import Mask
from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example, encode_fitting
from masquerade.evaluate.panel import Panel
from masquerade.evaluate.treatment import PHASES, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from masquerade.pruning import certificate, neutral
from masquerade.pruning.builder import Work, count
from masquerade.pruning.recipe import Recipe

LEAST = 2  # examples, for an interval


@dataclass(frozen=True)
class Served:
    """A mask and the gamma that requests get which name none."""

    mask: Mask
    gamma: float


@dataclass(frozen=True)
class HeldOut:
    """Text that the mask was not found on. Without neutral examples the base's own answers are taken, as in a build."""

    own: Sequence[Example]
    contrast: Sequence[Example] = ()
    neutral: Sequence[Example] = ()


def measure(
    base: Base,
    manager: MaskManager,
    persona: Served,
    phase: Phase,
    held: HeldOut,
    opposite: Served | None = None,
    seed: int = 0,
) -> Work[tuple[dict[str, Any], dict[str, Any]]]:
    """The certificate, by the code that a build uses, and what it was measured on, as digests and counts.

    `phase` is the default one. Flips are counted if there are an opposite and examples of the contrast. The budgets are
    those of `Recipe`. Raises `BadDataset` for fewer than `LEAST` examples that fit the base's context.
    """
    started = time.perf_counter()
    own, contrast, calm = (_encode(base, side) for side in (held.own, held.contrast, held.neutral))
    if len(own) < LEAST:
        raise BadDataset(
            f"{len(own)} of {len(held.own)} held-out examples fit the base's context; give at least {LEAST}"
        )
    calm = calm or (yield from count("neutral", neutral.ask_base(base)))
    sides = {1: persona} | ({-1: opposite} if opposite and contrast else {})
    worn = {side: {at: _treat(manager, served, at) for at in PHASES} for side, served in sides.items()}
    panel = Panel(base, own, contrast, calm)
    figures = yield from count("certify", certificate.judge(base, panel, worn, {1: phase}, seed))
    found = figures[1] | certificate.describe(persona.mask.targets)
    found |= certificate.conclude(found, Recipe().limits)
    if opposite:
        found["overlap"] = certificate.compare(persona.mask, opposite.mask)
    found |= {
        "phase": {"default": phase, "why": "the one it is served in"},
        "splits": {"report": len(own), "neutral": len(calm), "too_long_left_out": len(held.own) - len(own)},
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": certificate.versions(),
    }
    texts: Mapping[str, Sequence[Encoded]] = {"own": own, "contrast": contrast, "neutral": calm}
    return found, {name: certificate.summarise(text) for name, text in texts.items() if text}


def _encode(base: Base, examples: Sequence[Example]) -> list[Encoded]:
    """Those that leave room for a response."""
    return [encoded for _, encoded in encode_fitting(base, examples)] if examples else []


def _treat(manager: MaskManager, served: Served, phase: Phase) -> Treatment:
    applied = AppliedMask(manager.fit(served.mask), served.gamma) if served.gamma < 1 else None
    return Treatment(applied=applied, phase=phase)
