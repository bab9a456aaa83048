"""A persona that ships for SmolLM2 on the quantised forms of its base: shift, and cost of its own and of neutral text.

`python -m benchmarks.forms --json [--quick]`. The mask, its held-out text and the neutral text, which the unquantised
base generates, are the same for every form. Ratios are against the base of the same form; what the form itself costs is
its base's perplexity over the unquantised base's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks._world import load_smollm2
from maskstore import Mask, read_mask
from masquerade import smollm2
from masquerade.evaluate.dataset import Encoded, encode, read_examples
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import Treatment
from masquerade.model import AppliedMask, Base, MaskManager, load
from masquerade.model.quantized import QUANTIZATIONS
from masquerade.pruning.neutral import generate_neutral_text

PERSONA = "introvert"
UNITS = {"margin_shift": "nats a token", "margin_shift_median": "nats a token", "own_ratio": "x", "neutral_ratio": "x"}
SIDES = {1: "own", -1: "the opposite's", 0: "neutral"}


def main() -> None:
    options = arguments(__doc__, "an eighth of the text").parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = load_smollm2()
    mask = read_mask(smollm2.PERSONAS / f"{PERSONA}.safetensors")
    sides = [read_examples(smollm2.DATA / f"{side}.heldout.jsonl") for side in (PERSONA, mask.info.opposite)]
    part = slice(None, None, 8 if options.quick else None)
    own, contrast = (encode(base, side[part]) for side in sides)
    texts = own, contrast, finish(generate_neutral_text(base, "report"))[part]
    figures = [Figure(f"texts, {what}", len(text), "texts") for what, text in zip(SIDES.values(), texts, strict=True)]
    unquantised, found = measure(base, mask, texts)
    figures += found
    del base
    for how in QUANTIZATIONS:
        _, found = measure(load("smollm2", device="cpu", quantization=how), mask, texts, unquantised)
        figures += found
    report("forms", figures, options.json)


def measure(
    base: Base, mask: Mask, texts: Sequence[Sequence[Encoded]], unquantised: SetLikelihoods | None = None
) -> tuple[SetLikelihoods, list[Figure]]:
    """The likelihoods under a form of the base, and the figures of the mask on it."""
    started = time.process_time()
    form = base.quantization or str(base.dtype).removeprefix("torch.")
    resident = MaskManager.attach(base.model).fit(mask)
    eval_set = EvaluationSet(base, *texts)
    before = finish(eval_set.measure_base())
    masked = Treatment(applied=AppliedMask(resident, mask.info.gamma), phase=mask.info.phase)
    after = finish(eval_set.measure(masked))
    found, intervals = eval_set.figures(1, before, after), eval_set.intervals(1, before, after)
    figures = list(_describe(form, found, intervals))
    if unquantised is not None:
        for side, what in SIDES.items():
            nats = (unquantised.sides[side].nats.sum() - before.sides[side].nats.sum()) / before.sides[
                side
            ].tokens.sum()
            figures.append(
                Figure(f"{form}: base's perplexity of {what} text over the unquantised", math.exp(nats), "x")
            )
    figures.append(Figure(f"{form}: CPU seconds", time.process_time() - started, "s"))
    return before, figures


def _describe(form: str, found: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]) -> Iterator[Figure]:
    for name, unit in UNITS.items():
        yield Figure(f"{form}: {name}", found[name], unit)
        for end, value in zip(("low", "high"), intervals[name], strict=True):
            yield Figure(f"{form}: {name} {end}", value, unit)


if __name__ == "__main__":
    main()
