"""A persona that ships for SmolLM2 on the quantised forms of its base: shift, cost of texts, weights' bytes, speed.

`python -m benchmarks.forms --json [--quick] [--forms int8,Q8_0]`. The forms are the quantisations of `--quantization`,
and GGUF files into which the base's weights are quantised again. The mask, its held-out text and the neutral text,
which the unquantised base generates, are the same for every form. Ratios are against the base of the same form; what
the form itself costs is its base's perplexity over the unquantised base's. Files stay in their blocks, as in a server.
Decode steps of the persona's requests take turns with the same in bfloat16; speed is the median of the pairs' ratios.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks._world import load_smollm2
from benchmarks.engine import start_decoding
from maskstore import Mask, read_mask
from masquerade import smollm2
from masquerade.evaluate.dataset import Encoded, encode, read_examples
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_targets, load
from masquerade.model.quantized import A8, QUANTIZATIONS
from masquerade.pruning.neutral import generate_neutral_text
from masquerade.sources import find_model
from tests.model.gguf_blocks import choose, quantise
from tests.model.ggufs import copy_metadata

PERSONA = "introvert"
KINDS = ("Q8_0", "Q6_K", "Q5_1", "Q4_0", "Q4_K")  # of GGUF; of K where rows are whole blocks
STREAMS = (1, 8)
STEPS = 60
UNITS = {"margin_shift": "nats a token", "margin_shift_median": "nats a token", "own_ratio": "x", "neutral_ratio": "x"}
SIDES = {1: "own", -1: "the opposite's", 0: "neutral"}


def main() -> None:
    parser = arguments(__doc__, "an eighth of the text")
    parser.add_argument("--forms", default=",".join((*QUANTIZATIONS, A8, *KINDS)), help="those that are measured")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = load_smollm2()
    mask = read_mask(smollm2.PERSONAS / f"{PERSONA}.safetensors")
    sides = [read_examples(smollm2.DATA / f"{side}.heldout.jsonl") for side in (PERSONA, mask.info.opposite)]
    part = slice(None, None, 8 if options.quick else None)
    manager = MaskManager.attach(base.model)
    own, contrast = (encode(base, side[part]) for side in sides)
    texts = own, contrast, finish(generate_neutral_text(base, "report"))[part]
    figures = [Figure(f"texts, {what}", len(text), "texts") for what, text in zip(SIDES.values(), texts, strict=True)]
    worn = AppliedMask(manager.fit(mask), mask.info.gamma)
    unquantised, found = measure(base, worn, mask, texts)
    figures += found
    for form in options.forms.split(","):
        other = load_form(form)
        own_manager = MaskManager.attach(other.model)
        applied = AppliedMask(own_manager.fit(mask), mask.info.gamma)
        _, found = measure(other, applied, mask, texts, unquantised, form)
        figures += [*found, Figure(f"{form}: weights", count_bytes(other) / 1e6, "MB")]
        for streams in STREAMS:
            ratio = compare_steps((base, worn), (other, applied), streams, 8 if options.quick else STEPS)
            figures.append(Figure(f"{form}: decode speed of {streams} streams / bfloat16's", ratio, "x"))
        print(f"{form}: done", file=sys.stderr, flush=True)
    report("forms", figures, options.json)


def load_form(form: str) -> Base:
    """SmolLM2 in a quantised form."""
    if form in (*QUANTIZATIONS, A8):
        return load_smollm2(quantization=form)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{form}.gguf")
        requantise(find_model("smollm2").path, path, GGMLQuantizationType[form])
        return load(str(path), device="cpu", keep_blocks=True)


def count_bytes(base: Base) -> int:
    """Of the weights, their scales included."""
    total = sum(weight.nbytes for weight in base.model.parameters())
    for linear in find_targets(base.model).values():
        weight: Any = linear.weight
        state = getattr(weight, "quant_state", None)
        scales = state.absmax if state is not None else getattr(weight, "SCB", None)
        total += 0 if scales is None else scales.nbytes
    return total


def compare_steps(one: tuple[Base, AppliedMask], other: tuple[Base, AppliedMask], streams: int, steps: int) -> float:
    """How much faster decode steps of the other are, each right after one of the first."""
    engines = [start_decoding(base, streams, [applied]) for base, applied in (one, other)]
    ratios = []
    for _ in range(steps):
        times = []
        for engine in engines:
            started = time.process_time()
            engine.step()
            times.append(time.process_time() - started)
        ratios.append(times[0] / times[1])
    for engine in engines:
        engine.stop()
    return float(np.median(ratios))


def requantise(source: Path, path: Path, kind: GGMLQuantizationType) -> None:
    """Write a GGUF with all matrices of another in one type, or in the one that llama.cpp takes where none fits."""
    reader, writer = GGUFReader(source), GGUFWriter(path, "none")
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        chosen = choose(kind, tensor.shape[0]) if len(tensor.shape) > 1 else tensor.tensor_type
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        raw = None if chosen == GGMLQuantizationType.F32 else chosen
        writer.add_tensor(tensor.name, quantise(values, chosen), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(
    base: Base,
    applied: AppliedMask,
    mask: Mask,
    texts: Sequence[Sequence[Encoded]],
    unquantised: SetLikelihoods | None = None,
    form: str = "bfloat16",
) -> tuple[SetLikelihoods, list[Figure]]:
    """The likelihoods under a form of the base, and the figures of the mask on it."""
    started = time.process_time()
    eval_set = EvaluationSet(base, *texts)
    before = finish(eval_set.measure_base())
    masked = Treatment(applied=applied, phase=mask.info.phase)
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
