"""The native masked product against its own dense product and against torch's `F.linear`, quantised weights against
bf16, native attention against torch's, and what a model gains.

`python -m benchmarks.kernels --json [--quick]`, on one thread. Weights rotate through a pool far larger than the
processor's cache, so that every product reads them from memory, as a decode step does. Candidates are interleaved call
by call; a figure is the ratio of the 25th percentiles of the thread's CPU time. End to end, the model of
`benchmarks.engine` decodes in bf16; runs are interleaved, and the ratio of the medians counts.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn
from transformers.utils import logging

from benchmarks import engine
from benchmarks._report import Figure, report
from maskstore import encode
from masquerade.engine import EngineConfig
from masquerade.engine.attention import AttentionCall, Scores
from masquerade.engine.kv_cache import KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.row_groups import NativeRows, group_for_torch
from masquerade.engine.scheduler import Chunk
from masquerade.kernels import (
    NativeMask,
    NativeParts,
    NativeProduct,
    NativeSpan,
    QuantisedWeight,
    correct,
    differentiate,
)
from masquerade.kernels.quantised import FORMS
from masquerade.model import AppliedMask, MaskManager
from tests.model.gguf_blocks import quantise

FULL = ((2048, 2048), (4096, 4096), (14336, 4096))
QUICK = ((2048, 2048),)
QUANTISED = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096), (49152, 576))
DIFFERENTIATED = ((576, 576), (1536, 576), (576, 1536), (49152, 576))
PLAIN = EngineConfig(speculate=False)
POOL = 400e6  # bytes of weights
RHO = 0.003
BITMAP = 0.5


@dataclass(frozen=True)
class Case:
    """Rows of a batch, their masks, and the bounds to reach."""

    dtype: torch.dtype
    rows: int
    personas: int
    kinds: tuple[str, ...]  # of `list` and `bits`
    reaches: tuple[tuple[str, str, str], ...]  # kind, peer, bound
    gamma: float = 0.0

    @property
    def label(self) -> str:
        dtype = "bf16" if self.dtype is torch.bfloat16 else "fp32"
        masks = f"{self.personas} personas" if self.personas > 1 else "one persona"
        return f"{dtype}, {self.rows} rows of {masks}" if self.rows > 1 else f"{dtype}, 1 row"


NAMES = {"list": "sparse 0.3 %", "bits": "bitmap", "own": "own dense", "torch": "torch dense"}
BF16, FP32 = torch.bfloat16, torch.float32
CASES = (
    Case(
        BF16,
        1,
        1,
        ("bits", "list"),
        (
            ("bits", "own", "<= 1.06"),
            ("list", "own", "<= 1.02"),
            ("bits", "torch", "<= 0.65"),
            ("list", "torch", "<= 0.65"),
        ),
    ),
    Case(FP32, 1, 1, ("bits", "list"), (("bits", "torch", "<= 1.05"), ("list", "torch", "<= 1.05"))),
    Case(BF16, 16, 16, ("bits", "list"), (("bits", "torch", "<= 1.0"), ("list", "torch", "<= 0.75"))),
    Case(BF16, 256, 1, ("bits", "list"), (("bits", "torch", "<= 0.92"), ("list", "torch", "<= 0.92"))),
    Case(FP32, 16, 16, ("bits", "list"), ()),
    Case(FP32, 256, 1, ("bits", "list"), ()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one shape and few repeats; within a minute")
    parser.add_argument(
        "--only", choices=("products", "base", "quantised", "gradients", "attention", "model"), help="one part of it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes, seconds = (QUICK, 1.5) if options.quick else (FULL, 8.0)
    figures: list[Figure] = []
    if options.only in (None, "products"):
        figures += [figure for case in CASES for figure in measure(case, shapes, seconds)]
    if options.only in (None, "base"):
        figures += measure_base(seconds / 8)
    if options.only in (None, "quantised"):
        figures += measure_quantised(((576, 576),) if options.quick else QUANTISED, seconds / 8)
    if options.only in (None, "gradients"):
        figures += measure_gradients(((576, 576),) if options.quick else DIFFERENTIATED, seconds / 4)
    if options.only in (None, "attention"):
        figures += measure_attention(seconds / 8)
    if options.only in (None, "model"):
        figures += measure_model(engine.QUICK if options.quick else engine.FULL, 2 if options.quick else 5)
    report("kernels", figures, options.json)


def measure(case: Case, shapes: Sequence[tuple[int, int]], seconds: float) -> Iterator[Figure]:
    """The ratios of one case over the shapes."""
    medians = [compare(case, shape, seconds) for shape in shapes]
    asked = {(kind, peer): bound for kind, peer, bound in case.reaches}
    for kind in case.kinds:
        for peer in ("own", "torch"):
            ratios = [times[kind] / times[peer] for times in medians]
            bound = asked.get((kind, peer))
            for (out, columns), ratio in zip(shapes, ratios, strict=True):
                yield Figure(f"{case.label}, {NAMES[kind]} / {NAMES[peer]}, {out} x {columns}", ratio, "x", bound)


def compare(case: Case, shape: tuple[int, int], seconds: float) -> dict[str, float]:
    """The 25th percentile of each candidate's CPU time."""
    out, columns = shape
    count = max(3, int(POOL / (out * columns * case.dtype.itemsize)))
    linears = [nn.Linear(columns, out, bias=False, dtype=case.dtype).requires_grad_(False) for _ in range(count)]
    x = torch.randn(case.rows, columns).to(case.dtype)
    candidates: dict[str, Callable[[nn.Linear], object]] = {"own": turn([NativeProduct()], x)}
    for kind in case.kinds:
        seeds = range(max(1, 4 // case.personas))
        candidates[kind] = turn([make_product(case, linears[0], kind, seed) for seed in seeds], x)
    candidates["torch"] = lambda linear: F.linear(x, linear.weight)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    weights, until = cycle(linears), time.monotonic() + seconds
    while time.monotonic() < until or len(times["own"]) < 5:
        for name, run in candidates.items():
            linear = next(weights)
            started = time.thread_time()
            run(linear)
            times[name].append(time.thread_time() - started)
    return {name: float(np.percentile(spent, 25)) for name, spent in times.items()}


def turn(products: Sequence[NativeProduct], x: torch.Tensor) -> Callable[[nn.Linear], object]:
    """Take products in turn, so that masks come from memory, too."""
    ring = cycle(products)
    return lambda linear: (product := next(ring))(x, linear.weight, None, product.find("linear"))


def make_product(case: Case, linear: nn.Linear, kind: str, seed: int) -> NativeProduct:
    """The product of rows that take turns among random masks."""
    rng, share = np.random.default_rng(seed), RHO if kind == "list" else BITMAP
    spans = []
    for persona in range(case.personas):
        mask = correct(linear, encode(rng.random(tuple(linear.weight.shape), np.float32) < share), kind)
        assert isinstance(mask, NativeMask)
        parts = NativeParts({"linear": mask}, {"linear": 0})
        spans += [NativeSpan(parts, 1 - case.gamma, row, row + 1) for row in range(persona, case.rows, case.personas)]
    return NativeProduct(spans)


def measure_base(seconds: float) -> Iterator[Figure]:
    """Rows without masks, natively and by torch, in the shapes of SmolLM2 and larger ones; how fast few rows read."""
    for dtype, name in ((FP32, "fp32"), (BF16, "bf16")):
        for out, columns in ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096), (49152, 576)):
            for rows in (1, 2, 4, 16, 64, 512):
                times = compare(Case(dtype, rows, 1, (), ()), (out, columns), seconds)
                case = f"{name}, {rows} rows without masks, {out} x {columns}"
                yield Figure(f"{case}, own dense / torch dense", times["own"] / times["torch"], "x", "<= 1.05")
                if rows <= 4:
                    rate = out * columns * dtype.itemsize / times["own"] / 1e9
                    yield Figure(f"{case}, weights read", rate, "GB/s")


def measure_quantised(shapes: Sequence[tuple[int, int]], seconds: float) -> Iterator[Figure]:
    """Products of weights in GGUF's blocks, with inputs as they are and rounded, against those of weights in bf16."""
    for shape in shapes:
        for rows in (1, 4, 16, 256):
            times = compare_quantised(shape, rows, seconds)
            for form in sorted(times.keys() - {"bf16"}):
                name = f"{form} / bf16, {rows} rows, {shape[0]} x {shape[1]}"
                yield Figure(name, times[form] / times["bf16"], "x", "<= 1.0" if rows == 1 else None)


def measure_gradients(shapes: Sequence[tuple[int, int]], seconds: float) -> Iterator[Figure]:
    """A product of 256 rows and its gradient of the rows, in bf16, against torch's own in bf16 and in fp32."""
    for out, columns in shapes:
        wide = torch.randn(256, columns), torch.randn(out, columns), torch.randn(256, out)
        narrow = [one.to(BF16) for one in wide]
        candidates = {
            "ours": partial(multiply_and_back, differentiate, *narrow),
            "bf16": partial(multiply_and_back, F.linear, *narrow),
            "fp32": partial(multiply_and_back, F.linear, *wide),
        }
        spent = {name: float(np.percentile(times, 25)) for name, times in interleave(candidates, seconds).items()}
        for peer in ("bf16", "fp32"):
            name = f"a product and its gradient, bf16, 256 rows, {out} x {columns}, ours / torch {peer}"
            yield Figure(name, spent["ours"] / spent[peer], "x", "<= 1.05" if peer == "bf16" else None)


def multiply_and_back(
    multiply: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, above: torch.Tensor
) -> None:
    """A product, and the gradient of x."""
    torch.autograd.grad(multiply(x.requires_grad_(True), weight, None), x, above)


def interleave(candidates: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """The CPU times of candidates that are called in turn, five times at least."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    until = time.monotonic() + seconds
    while time.monotonic() < until or min(map(len, times.values())) < 5:
        for name, run in candidates.items():
            started = time.thread_time()
            run()
            times[name].append(time.thread_time() - started)
    return times


def compare_quantised(shape: tuple[int, int], rows: int, seconds: float) -> dict[str, float]:
    """The 25th percentile of each form's CPU time."""
    out, columns = shape
    count = max(2, int(POOL / (out * columns * BF16.itemsize)))
    blocks = np.random.default_rng(0).normal(0, 0.05, (min(out, 1024), columns)).astype(np.float32)
    pools: dict[str, list[torch.Tensor]] = {"bf16": [torch.randn(out, columns).to(BF16) for _ in range(count)]}
    fitting = (form for form in FORMS if not columns % GGML_QUANT_SIZES[GGMLQuantizationType[form]][0])
    for form, rounds in product(fitting, (False, True)):
        raw = quantise(blocks, GGMLQuantizationType[form])
        weight = QuantisedWeight.empty(form, out, columns, rounds=rounds)
        for first in range(0, out, len(raw)):
            weight.write(first, raw[: out - first])
        pools[f"{form}, a8" if rounds else form] = [copy.deepcopy(weight) for _ in range(count)]
    weights = {form: cycle(pool) for form, pool in pools.items()}
    multiply, x, until = NativeProduct(), torch.randn(rows, columns).to(BF16), time.monotonic() + seconds
    times: dict[str, list[float]] = {form: [] for form in pools}
    while time.monotonic() < until or len(times["bf16"]) < 5:
        for form, spent in times.items():
            weight_ = next(weights[form])
            started = time.thread_time()
            multiply(x, weight_, None)
            spent.append(time.thread_time() - started)
    return {form: float(np.percentile(spent, 25)) for form, spent in times.items()}


def measure_attention(seconds: float) -> Iterator[Figure]:
    """One layer with the heads of SmolLM2 (9 of 64, three to a head of keys): decodes, and chunks of prompts."""
    decodes = [(rows, 1, context) for rows in (1, 4, 16, 64) for context in (64, 512, 2048, 8192)]
    prompts = [(1, rows, rows + before) for rows in (32, 128, 512) for before in (0, 512, 2048)]
    for dtype in (BF16, FP32):
        for count, rows, length in decodes + prompts:
            if count * length > 2**17:
                continue
            native, torch_ = compare_attention(dtype, count, rows, length, seconds)
            what = f"a chunk of {rows} rows" if rows > 1 else f"{count} decode{'s' * (count > 1)}"
            label = f"{'bf16' if dtype is BF16 else 'fp32'}, {what}, context {length}"
            yield Figure(f"attention, {label}, torch", torch_ * 1e3, "CPU-ms")
            yield Figure(f"attention, {label}, native / torch", native / torch_, "x", "<= 1.05")


def compare_attention(dtype: torch.dtype, count: int, rows: int, length: int, seconds: float) -> tuple[float, float]:
    """The median CPU time of the native kernel and of torch: `rows` rows at the end of each of `count` contexts."""
    config: Any = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=3, num_attention_heads=9, hidden_size=576, head_dim=64
    )
    width = -(-length // BLOCK_SIZE)
    cache = KVCache(config, count * width, dtype, torch.device("cpu"))
    cache.keys.normal_(), cache.values.normal_()
    table = np.random.default_rng(0).permutation(count * width).reshape(count, width) + 1
    requests: list[Any] = [SimpleNamespace(batch_index=index) for index in range(count)]
    chunks = [Chunk(request, length - rows, length, True) for request in requests]
    queries, keys, values = (torch.randn(count * rows, heads, 64).to(dtype) for heads in (9, 3, 3))
    call = AttentionCall(0, Scores(0.125), cache, keys, values)
    native = NativeRows(chunks, table, cache)
    groups = [*group_for_torch(chunks, table, cache)]
    candidates: Mapping[str, Callable[[], object]] = {
        "native": lambda: native.attend(queries, call),
        "torch": lambda: [group.attend(queries[group.start : group.stop], call) for group in groups],
    }
    times = interleave(candidates, seconds)
    return float(np.median(times["native"])), float(np.median(times["torch"]))


def measure_model(scale: engine.Scale, repeats: int) -> Iterator[Figure]:
    """One stream against `generate` on the same bf16 model, and 16 streams of 16 sparse personas against the base's."""
    base = engine.make_base(scale.model)
    base.model.to(BF16)
    one, many = engine.make_prompts(1, (8, 8)), engine.make_prompts(16, (8, 8))
    manager = MaskManager.attach(base.model)
    applied_masks: list[AppliedMask | None] = [
        AppliedMask(manager.fit(engine.make_mask(base, seed)), 0.0) for seed in range(16)
    ]
    manager.detach()
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        times["generate"].append(engine.run_generate(base, one, scale.new))
        manager = MaskManager.attach(base.model)
        times["one"].append(engine.run_engine(base, one, [None], scale.new, PLAIN))
        times["base"].append(engine.run_engine(base, many, [None], scale.new, PLAIN))
        times["masked"].append(engine.run_engine(base, many, applied_masks, scale.new, PLAIN))
        manager.detach()
    spent = {name: float(np.median(runs)) for name, runs in times.items()}
    yield Figure("engine, 1 stream of a bf16 model", scale.new / spent["one"], "tokens/CPU-s")
    yield Figure("engine / generate, 1 stream of a bf16 model", spent["generate"] / spent["one"], "x", ">= 1.4")
    yield Figure("engine, 16 streams of the base, bf16", 16 * scale.new / spent["base"], "tokens/CPU-s")
    yield Figure("16 streams over 16 sparse personas / the base, bf16", spent["base"] / spent["masked"], "x", ">= 0.93")


if __name__ == "__main__":
    main()
