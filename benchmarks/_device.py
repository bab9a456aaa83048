"""A random model on a CUDA device, masks of several forms for it, and decode steps of any number of rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from maskstore import BaseRef as MaskBase
from maskstore import Bitmap, Mask, MaskInfo, Sparse, Target
from masquerade.engine import Request, attention
from masquerade.engine.cuda.graphs import DecodeGraphs, Run, capture
from masquerade.engine.kv_cache import KVCache, bytes_per_position
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.model import AppliedMask, Base, MaskManager, find_targets

SPARSE, BITMAP, SINGLE = "sparse 0.3 %", "bitmap", "one weight an output"
# What share of the weights a list prunes, by form; the most important form first.
SHARES = {SPARSE: 0.003, BITMAP: None, "sparse 1 %": 0.01, "sparse 0.1 %": 0.001, SINGLE: 0.0}
FORMS = tuple(form for form in SHARES if form != SINGLE)


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    rows: Sequence[int] = (1, 16, 64, 256)  # of a decode step
    context: int = 512  # positions of each row
    personas: Sequence[int] = (1, 16, 64)
    forms: Sequence[str] = FORMS
    adapters: int = 8  # of PEFT, and personas of the engine
    prefill: int = 8192  # tokens of the long prompt
    requests: int = 32  # to the engine
    prompt: int = 128  # tokens of each
    answer: int = 64
    rounds: int = 3  # of prompts and of requests
    steps: int = 5  # between two looks at the clock
    repeats: int = 9
    dtype: torch.dtype = torch.bfloat16


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

    def compare(self, cases: Mapping[str, Callable[[], Callable[[], object]]], scale: Scale) -> dict[str, float]:
        """The median seconds of one run of each case, interleaved. A case prepares a run and returns it."""

        def many(case: Callable[[], Callable[[], object]]) -> float:
            run = case()
            return self.time(lambda: [run() for _ in range(scale.steps)]) / scale.steps

        return self._interleave({name: lambda case=case: many(case) for name, case in cases.items()}, scale.repeats)  # type: ignore[misc]

    def alternate(self, cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """The median seconds of each case, interleaved."""
        return self._interleave({name: lambda case=case: self.time(case) for name, case in cases.items()}, rounds)  # type: ignore[misc]

    def _interleave(self, cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
        taken = [{name: measure() for name, measure in cases.items()} for _ in range(1 + rounds)]
        return {name: float(np.median([one[name] for one in taken[1:]])) for name in cases}  # the first warms up


class Steps:
    """Decode steps of one batch, as the engine runs them, over graphs that all cases of a number of rows share."""

    def __init__(self, base: Base, kv: KVCache, scale: Scale) -> None:
        repeat = capture if base.device.type == "cuda" else lambda run: run
        self._graphs = DecodeGraphs(replace(base, context=scale.context), kv, max(scale.rows), repeat)
        self._context = scale.context
        columns = -(-scale.context // BLOCK_SIZE)
        self._table = np.arange(1, max(scale.rows) * columns + 1).reshape(-1, columns)

    def settle(self, rows: int, applied_masks: Sequence[AppliedMask | None]) -> Run:
        """Run one whole step whose rows have these masks by turns; returns what replays its graph."""
        assert self._graphs.run(self._make_chunks(rows, applied_masks), self._table) is not None
        run = next(reversed(self._graphs._graphs.values())).run
        assert run is not None
        return run

    def measure_switch(self, rows: int, applied_masks: Sequence[AppliedMask | None]) -> float:
        """Seconds of host work when all rows change their personas: making and writing the slot map."""
        self.settle(rows, applied_masks)
        slots = next(reversed(self._graphs._graphs.values())).slots
        turned = [*applied_masks[1:], *applied_masks[:1]]
        batches, spent = [self._make_chunks(rows, masks) for masks in (applied_masks, turned)], []
        for turn in range(21):
            started = time.perf_counter()
            slots.write(self._graphs._map_slots(batches[turn % 2]))
            spent.append(time.perf_counter() - started)
        return float(np.median(spent))

    def _make_chunks(self, rows: int, applied_masks: Sequence[AppliedMask | None]) -> list[Chunk]:
        chunks = []
        for row in range(rows):
            request = Request([5] * self._context, 1, lambda _: None, applied_masks[row % len(applied_masks)])
            request.batch_index = row
            chunks.append(Chunk(request, self._context - 1, self._context, True))
        return chunks


class World:
    """The model with masks attached, its cache, and what all rows of a run share."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.clock = scale, Clock(device)
        self.base = make_base(scale, device)
        self.manager = MaskManager.attach(self.base.model)
        self._plain_attention = self.base.model.config._attn_implementation
        self.base.model.set_attn_implementation(attention.NAME)
        blocks = max(scale.rows) * -(-scale.context // BLOCK_SIZE)
        self.kv = KVCache(self.base.model.config, blocks, self.base.dtype, device)
        self.kv.zero([*range(1, blocks + 1)])  # the steps read a whole context, of which they write one position
        self.steps = Steps(self.base, self.kv, scale)
        self.copy_speed = self._measure_copy(device)  # bytes that a copy reads and writes in a second
        self._masks: dict[str, Mask] = {}
        self._applied: dict[str, list[AppliedMask]] = {}

    def find_mask(self, form: str) -> Mask:
        """A random mask of a form, in host memory."""
        if form not in self._masks:
            self._masks[form] = make_mask(self.base, SHARES[form])
        return self._masks[form]

    def fit(self, form: str, mask: Mask) -> Any:
        """Load a mask of a form onto the device."""
        return self.manager.fit(mask, "cuda-bits" if form == BITMAP else "cuda-list")

    def find_personas(self, form: str, count: int) -> list[AppliedMask | None]:
        """So many masks of a form on the device, each with memory of its own. All prune the same weights."""
        applied = self._applied.setdefault(form, [])
        while len(applied) < count:
            resident = self.fit(form, self.find_mask(form))
            applied.append(AppliedMask(replace(resident, digest=f"{form}, {len(applied)}"), 0.0))
        return [*applied[:count]]

    def drop_personas(self) -> None:
        """Free the device memory of all masks."""
        self._applied.clear()

    def count_bytes(self, rows: int, personas: Sequence[AppliedMask | None] = ()) -> int:
        """Bytes that a step has to read: all weights but the embeddings, the rows' cache, and their masks."""
        weights = sum(part.nbytes for name, part in self.base.model.named_parameters() if "embed" not in name)
        cached = rows * self.scale.context * bytes_per_position(self.base.model.config, self.base.dtype)
        return weights + cached + sum(applied.mask.nbytes for applied in personas if applied)

    @contextmanager
    def detach(self, attention_name: str | None = None) -> Iterator[None]:
        """The plain model in the block, with an attention by name or transformers' own."""
        self.manager.detach()
        self.base.model.set_attn_implementation(attention_name or self._plain_attention)
        yield
        self.base.model.set_attn_implementation(attention.NAME)
        self.manager = MaskManager.attach(self.base.model)

    def _measure_copy(self, device: torch.device) -> float:
        source = torch.zeros(2**28 if device.type == "cuda" else 2**16, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(self.clock.time(lambda: target.copy_(source)) for _ in range(10))


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
        max_position_embeddings=2 * scale.prefill,
        dtype=scale.dtype,
    )
    with device:
        model: Any = LlamaForCausalLM(config).to(scale.dtype).eval().requires_grad_(False)
    return Base("random", Path(), "0" * 64, model, None, 2 * scale.prefill, frozenset())


def make_mask(base: Base, share: float | None) -> Mask:
    """Lists that prune a share of every row, or bitmaps that prune half of the weights."""
    rng = np.random.default_rng(0)

    def make(out: int, columns: int) -> Target:
        return make_bits(out, columns, rng) if share is None else make_list(out, columns, share, rng)

    linears = find_targets(base.model).items()
    targets = {name: make(linear.out_features, linear.in_features) for name, linear in linears}
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


def make_list(out: int, columns: int, share: float, rng: np.random.Generator) -> Target:
    """One weight in each of as many equal segments of a row; at least one."""
    count = max(1, round(share * columns))
    stretch = columns // count
    chosen: NDArray[Any] = np.arange(count) * stretch + rng.integers(stretch, size=(out, count))
    rows = np.arange(out + 1, dtype=np.int32) * np.int32(count)
    return Sparse(rows, chosen.ravel().astype(np.uint16 if columns <= 2**16 else np.uint32), columns)


def make_bits(out: int, columns: int, rng: np.random.Generator) -> Target:
    """Half of the weights."""
    assert columns % 64 == 0
    return Bitmap(rng.integers(256, size=(out, columns // 8), dtype=np.uint8), columns)
