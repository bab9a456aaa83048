"""A persona that ships for SmolLM2 on the quantised forms of its base: shift, and cost of its own and of neutral text.

`python -m benchmarks.forms --json [--quick] [--forms int8,Q8_0]`. The forms are the quantisations of `--quantization`,
and GGUF files into which the base's weights are quantised again. The mask, its held-out text and the neutral text,
which the unquantised base generates, are the same for every form. Ratios are against the base of the same form; what
the form itself costs is its base's perplexity over the unquantised base's.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
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
from masquerade.model.quantized import A8, QUANTIZATIONS
from masquerade.pruning.neutral import generate_neutral_text
from masquerade.sources import find_model
from tests.model.gguf_blocks import choose, quantise
from tests.model.ggufs import copy_metadata

PERSONA = "introvert"
KINDS = ("Q8_0", "Q6_K", "Q5_1", "Q4_0", "Q4_K")  # of GGUF; of K where rows are whole blocks
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
    own, contrast = (encode(base, side[part]) for side in sides)
    texts = own, contrast, finish(generate_neutral_text(base, "report"))[part]
    figures = [Figure(f"texts, {what}", len(text), "texts") for what, text in zip(SIDES.values(), texts, strict=True)]
    unquantised, found = measure(base, mask, texts)
    figures += found
    del base
    for form in options.forms.split(","):
        _, found = measure(load_form(form), mask, texts, unquantised, form)
        figures += found
    report("forms", figures, options.json)


def load_form(form: str) -> Base:
    """SmolLM2 in a quantised form."""
    if form in (*QUANTIZATIONS, A8):
        return load("smollm2", device="cpu", quantization=form)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{form}.gguf")
        requantise(find_model("smollm2").path, path, GGMLQuantizationType[form])
        return load(str(path), device="cpu")


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
    mask: Mask,
    texts: Sequence[Sequence[Encoded]],
    unquantised: SetLikelihoods | None = None,
    form: str = "bfloat16",
) -> tuple[SetLikelihoods, list[Figure]]:
    """The likelihoods under a form of the base, and the figures of the mask on it."""
    started = time.process_time()
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
