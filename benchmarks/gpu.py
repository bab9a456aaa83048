"""A decode step on a CUDA device: personas against the base under the same CUDA graph, PEFT, and the memory's speed.

`python -m benchmarks.gpu --json [--quick]`. A random Llama of the 8B shape in bf16, 32 requests with 512 positions of
context each. Cases are interleaved and the median of each counts. A time is that of ten repetitions of a graph, so the
host's work is not included; that of a switch is a separate figure. PEFT, if it is installed, runs the same model with a
rank-16 adapter of all Linears for each persona, mixed in one batch. Without a CUDA device nothing is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks._report import Figure, arguments, report
from maskstore import BaseRef as MaskBase
from maskstore import Bitmap, Mask, MaskInfo, Sparse, Target
from masquerade.engine import Request, attention
from masquerade.engine.cuda.graphs import DecodeGraphs, Run, capture
from masquerade.engine.kv_cache import KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.model import AppliedMask, Base, MaskManager, find_targets

RHO = 0.003
REACH = {1: "<= 1.05", 8: "<= 1.10", 32: "<= 1.15"}


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    rows: int = 32
    context: int = 512
    personas: Sequence[int] = (1, 8, 32)
    adapters: int = 8
    steps: int = 10  # between two looks at the clock
    repeats: int = 20
    dtype: torch.dtype = torch.bfloat16


FULL = Scale()
QUICK = replace(FULL, layers=8, repeats=5)


def main() -> None:
    options = arguments(__doc__, quick="a quarter of the layers").parse_args()
    if torch.cuda.is_available():
        figures = list(measure(QUICK if options.quick else FULL, torch.device("cuda")))
    else:
        print("there is no CUDA device; nothing was measured", file=sys.stderr)
        figures = []
    report("gpu", figures, options.json)


def measure(scale: Scale, device: torch.device) -> Iterator[Figure]:
    """All figures. On a CPU, which only tests do, steps run in Triton's interpreter and nothing is captured."""
    base = make_base(scale, device)
    manager = MaskManager.attach(base.model)
    kv = KVCache(base.model.config, scale.rows * -(-scale.context // BLOCK_SIZE), base.dtype, device)
    clock = Clock(device)
    before, base_attention = time.perf_counter(), base.model.config._attn_implementation
    masks = [make_mask(base, seed, make_list) for seed in range(max(scale.personas))]
    bitmap = make_mask(base, 0, make_bits)
    print(f"masks made in {time.perf_counter() - before:.0f} s", file=sys.stderr)
    yield from measure_loads(manager, masks[0], bitmap, clock)
    lists = [AppliedMask(manager.fit(mask, "cuda-list"), 0.0) for mask in masks]
    bits = AppliedMask(manager.fit(bitmap, "cuda-bits"), 0.0)
    base.model.set_attn_implementation(attention.NAME)
    steps = Steps(base, kv, scale)
    cases: dict[str, list[AppliedMask | None]] = {
        "base": [None],
        "bitmap": [bits],
        "bitmap, soft": [replace(bits, gamma=0.5)],
    }
    cases |= {f"sparse, {count}": [*lists[:count]] for count in scale.personas}
    with torch.inference_mode():
        times = clock.compare(
            {name: partial(steps.settle, applied_masks) for name, applied_masks in cases.items()}, scale
        )
        yield Figure("step of the base", times["base"] * 1e3, "ms")
        for count in scale.personas:
            ratio = times[f"sparse, {count}"] / times["base"]
            yield Figure(f"step, {count} sparse personas of {RHO:.1%} / base", ratio, "x", REACH.get(count))
        yield Figure("step, 1 bitmap persona / base", times["bitmap"] / times["base"], "x", "<= 1.10")
        yield Figure("step, 1 bitmap persona at gamma 0.5 / base", times["bitmap, soft"] / times["base"], "x")
        speed = measure_bandwidth(device, clock)
        read = count_bytes(base, kv)
        yield Figure("memory's speed, a copy's reads and writes", speed / 1e9, "GB/s")
        yield Figure("step of the base / reading its weights and cache once", times["base"] * speed / read, "x")
        yield Figure("switch of all rows to other personas, host work", steps.measure_switch(lists) * 1e6, "us")
    base.model.set_attn_implementation(base_attention)
    manager.detach()
    with suppress(ImportError), torch.inference_mode():
        seconds = measure_peft(base, scale, clock)
        ours = times[f"sparse, {min(scale.adapters, max(scale.personas))}"]
        yield Figure(f"tokens/s, personas / PEFT with {scale.adapters} adapters", seconds / ours, "x", ">= 5")


class Clock:
    """A clock of device time, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def time(self, run: Callable[[], object]) -> float:
        """Of one run."""
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def compare(self, cases: dict[str, Callable[[], Callable[[], object]]], scale: Scale) -> dict[str, float]:
        """The median seconds of one run of each case, interleaved. A case prepares a run and returns it."""

        def many(case: Callable[[], Callable[[], object]]) -> float:
            run = case()
            return self.time(lambda: [run() for _ in range(scale.steps)]) / scale.steps

        taken = [{name: many(case) for name, case in cases.items()} for _ in range(1 + scale.repeats)]
        return {name: float(np.median([one[name] for one in taken[1:]])) for name in cases}


class Steps:
    """Decode steps of one batch, as the engine runs them, over graphs that all cases share."""

    def __init__(self, base: Base, kv: KVCache, scale: Scale) -> None:
        repeat = capture if base.device.type == "cuda" else lambda run: run
        self._graphs = DecodeGraphs(base, kv, scale.rows, repeat)
        self._scale = scale
        columns = -(-scale.context // BLOCK_SIZE)
        self._table = np.arange(1, scale.rows * columns + 1).reshape(scale.rows, columns)
        kv.zero(self._table.ravel().tolist())  # the steps read a whole context, of which they write one position

    def settle(self, applied_masks: Sequence[AppliedMask | None]) -> Run:
        """Run one whole step whose rows have these masks by turns; returns what replays its graph."""
        assert self._graphs.run(self._chunk(applied_masks), self._table) is not None
        run = next(reversed(self._graphs._graphs.values())).run
        assert run is not None
        return run

    def measure_switch(self, applied_masks: Sequence[AppliedMask | None]) -> float:
        """Seconds of host work when all rows change their personas: making and writing the slot map."""
        self.settle(applied_masks)
        slots = next(reversed(self._graphs._graphs.values())).slots
        batches, spent = [self._chunk(applied_masks), self._chunk([*applied_masks[1:], *applied_masks[:1]])], []
        for turn in range(21):
            started = time.perf_counter()
            slots.write(self._graphs._map_slots(batches[turn % 2]))
            spent.append(time.perf_counter() - started)
        return float(np.median(spent))

    def _chunk(self, applied_masks: Sequence[AppliedMask | None]) -> list[Chunk]:
        chunks = []
        for row in range(self._scale.rows):
            request = Request([5] * self._scale.context, 1, lambda _: None, applied_masks[row % len(applied_masks)])
            request.batch_index = row
            chunks.append(Chunk(request, self._scale.context - 1, self._scale.context, True))
        return chunks


def make_base(scale: Scale, device: torch.device) -> Base:
    """A random model, created on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.inner,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.kv_heads,
        max_position_embeddings=8192,
        dtype=scale.dtype,
    )
    with device:
        model: Any = LlamaForCausalLM(config).to(scale.dtype).eval().requires_grad_(False)
    return Base("random", Path(), "0" * 64, model, None, scale.context, frozenset())


def make_mask(base: Base, seed: int, make: Callable[[int, int, np.random.Generator], Target]) -> Mask:
    rng = np.random.default_rng(seed)
    linears = find_targets(base.model).items()
    targets = {name: make(linear.out_features, linear.in_features, rng) for name, linear in linears}
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


def make_list(out: int, columns: int, rng: np.random.Generator) -> Target:
    """RHO of every row: one weight in each of as many equal segments."""
    count = max(1, round(RHO * columns))
    stretch = columns // count
    chosen = np.arange(count) * stretch + rng.integers(stretch, size=(out, count))
    rows = np.arange(out + 1, dtype=np.int32) * np.int32(count)
    return Sparse(rows, chosen.ravel().astype(np.uint16 if columns <= 2**16 else np.uint32), columns)


def make_bits(out: int, columns: int, rng: np.random.Generator) -> Target:
    """Half of the weights."""
    assert columns % 64 == 0
    return Bitmap(rng.integers(256, size=(out, columns // 8), dtype=np.uint8), columns)


def measure_loads(manager: MaskManager, listed: Mask, bitmap: Mask, clock: Clock) -> Iterator[Figure]:
    """From host memory to ready for use."""
    for kind, mask, backend in (("sparse", listed, "cuda-list"), ("bitmap", bitmap, "cuda-bits")):
        seconds = min(clock.time(lambda mask=mask, how=backend: manager.fit(mask, how)) for _ in range(3))  # type: ignore[misc]
        size = manager.fit(mask, backend).nbytes
        yield Figure(f"cold load of a {kind} persona from memory, {size / 1e6:.0f} MB", seconds * 1e3, "ms")


def measure_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**16, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(clock.time(lambda: target.copy_(source)) for _ in range(10))


def count_bytes(base: Base, kv: KVCache) -> int:
    """Bytes that a step of the base reads: all weights but the embeddings, and the whole cache."""
    weights = sum(part.nbytes for name, part in base.model.named_parameters() if "embed" not in name)
    return weights + kv.keys.nbytes + kv.values.nbytes


def measure_peft(base: Base, scale: Scale, clock: Clock) -> float:
    """Seconds of a step of PEFT's mixed batch."""
    from peft import LoraConfig, get_peft_model

    names = [f"p{number}" for number in range(scale.adapters)]
    config = LoraConfig(r=16, target_modules="all-linear")
    with torch.inference_mode(False):
        model = get_peft_model(base.model, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        model.eval()
    rows = [names[row % len(names)] for row in range(scale.rows)]
    cache = DynamicCache(config=base.model.config)
    model(torch.full((scale.rows, scale.context), 5, device=base.device), past_key_values=cache, adapter_names=rows)
    ids = torch.full((scale.rows, 1), 5, device=base.device)

    def step() -> None:
        model(ids, past_key_values=cache, adapter_names=rows)
        cache.crop(-1)

    return clock.compare({"step": lambda: step}, scale)["step"]


if __name__ == "__main__":
    main()
