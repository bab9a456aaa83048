"""Decode steps as CUDA graphs: what a step reads lies in tensors that stay put, and one launch does the rest.

Knows the padded sizes, what a row that pads a step does (it wears nothing and writes where nobody reads), and when a
step cannot be a graph. Refuses to decide which requests run.

There is a graph for every size and for every set of Linears that the batch's masks correct, made when it is first
needed; personas, strengths, pages and positions are data. Nothing in a step waits for the device.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masquerade.engine import attention, cuda
from masquerade.engine.cuda import PagedDecodes
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.model import Base, SlotMap, Slots, SlotShape, Span, Staging, find_entries

_log = logging.getLogger(__name__)

MOST = 32  # graphs that are kept; the one that was used longest ago goes

Run = Callable[[], Tensor]


def prepare(base: Base, pages: KVCache, running: int) -> DecodeGraphs | None:
    """Graphs for an engine, where there can be any: on a CUDA device with its kernels, for attention they know."""
    if not cuda.serves(base.device) or not attention.is_plain(base.model, base.context):
        return None
    return DecodeGraphs(base, pages, running, capture)


class Inputs:
    """What a decode step of up to `rows` rows reads, but for the masks."""

    def __init__(self, rows: int, columns: int, pages: KVCache) -> None:
        i32, i64 = torch.int32, torch.int64
        device = pages.keys.device
        self._pages = pages
        self._shape = rows, columns
        self._staging = Staging(
            {
                "ids": (i64, (1, rows)),
                "positions": (i64, (1, rows)),
                "write": (i64, (rows * pages.heads,)),
                "table": (i32, (rows, columns)),
                "lengths": (i32, (rows,)),
            },
            device,
        )
        tensors = self._staging.tensors
        self.ids, self.positions = tensors["ids"], tensors["positions"]
        decodes = PagedDecodes(0, rows, tensors["table"], tensors["lengths"])
        self.plan = attention.AttentionPlan(pages, tensors["write"], [decodes], [])

    def write(self, chunks: Sequence[Chunk], table: Index) -> None:
        """Serve these decodes from now on. `table` holds the pages of every seat."""
        (rows, columns), count = self._shape, len(chunks)
        ids, positions, lengths = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.ones(rows, np.int32)
        numbers = np.zeros((rows, columns), np.int32)
        ids[:count] = [chunk.request.ids[chunk.start] for chunk in chunks]
        positions[:count] = [chunk.start for chunk in chunks]
        lengths[:count] = positions[:count] + 1
        numbers[:count, : table.shape[1]] = table[[chunk.request.seat for chunk in chunks]]
        written, places = np.full(rows, self._pages.trash), np.arange(rows) % BLOCK_SIZE
        written[:count] = numbers[np.arange(count), positions[:count] // BLOCK_SIZE]
        places[:count] = positions[:count] % BLOCK_SIZE
        self._staging.write(
            {
                "ids": ids[None],
                "positions": positions[None],
                "write": self._pages.slots(written, places),
                "table": numbers,
                "lengths": lengths,
            }
        )


@dataclass
class DecodeGraph:
    """One graph: its masks' tensors, which batch's outfits are in them, and how to run it."""

    slots: Slots
    worn: int = 0
    run: Run | None = None


class DecodeGraphs:
    """The decode steps of one engine. `capture` turns a step into something that repeats it."""

    def __init__(self, base: Base, pages: KVCache, running: int, capture: Callable[[Run], Run]) -> None:
        self._base = base
        self._pages = pages
        self._capture = capture
        self._sizes = _sizes(running)
        self._columns = -(-min(base.context, pages.positions) // BLOCK_SIZE)
        self._inputs: dict[int, Inputs] = {}
        self._steps: OrderedDict[SlotShape, DecodeGraph] = OrderedDict()
        self._spans: list[Span] = []
        self._slot_map = SlotMap.of([], 0)
        self._changes = 0  # of outfits, so far

    def run(self, chunks: Sequence[Chunk], table: Index) -> Tensor | None:
        """The logits of a step, [chunks, vocabulary], valid until the next one; None if it must be run otherwise."""
        if not self._sizes or not all(chunk.is_decode and chunk.samples for chunk in chunks):
            return None
        slot_map = self._map_slots(chunks)
        if not all(find_entries(mask) is not None for mask in slot_map.masks):
            return None
        size = next(size for size in self._sizes if size >= len(chunks))
        if size not in self._inputs:
            self._inputs[size] = Inputs(size, self._columns, self._pages)
        self._inputs[size].write(chunks, table)
        step = self._find(slot_map.padded_frame(size))
        if step.worn != self._changes:
            step.slots.write(slot_map)
            step.worn = self._changes
        if step.run is None:
            step.run = self._make(step.slots, self._inputs[size])
        return None if step.run is None else step.run()[: len(chunks)]

    def _map_slots(self, chunks: Sequence[Chunk]) -> SlotMap:
        """While the same rows wear the same, they are not sorted out again."""
        spans = [
            span
            for row, (request, start, stop, _) in enumerate(chunks)
            if request.applied is not None
            for span in request.masked_spans(start, stop, row)
        ]
        if spans != self._spans or len(chunks) != len(self._slot_map.slots):
            self._spans, self._slot_map = spans, SlotMap.of(spans, len(chunks))
            self._changes += 1
        return self._slot_map

    def _find(self, frame: SlotShape) -> DecodeGraph:
        if frame not in self._steps:
            self._steps[frame] = DecodeGraph(Slots(frame, self._base.device))
            if len(self._steps) > MOST:
                self._steps.popitem(last=False)
        self._steps.move_to_end(frame)
        return self._steps[frame]

    def _make(self, slots: Slots, inputs: Inputs) -> Run | None:
        """A graph over these tensors, which hold a real step; what a first run writes, the repetition writes again."""

        def forward() -> Tensor:
            logits: Tensor = self._base.model(
                input_ids=inputs.ids,
                position_ids=inputs.positions,
                attention_mask=attention.NO_MASK,
                use_cache=False,
                logits_to_keep=0,  # all
                route=slots,
                plan=inputs.plan,
            ).logits[0]
            return logits

        try:
            return self._capture(forward)
        except RuntimeError as error:
            _log.warning("decode steps run without CUDA graphs, which is slower: %s", error)
            self._sizes, self._steps = [], OrderedDict()
            return None


def capture(run: Run) -> Run:
    """Record what a function does on the device; what comes back repeats it, into the same output."""
    current, beside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(current)
    with torch.cuda.stream(beside):  # kernels are compiled, libraries take their memory
        run()
        run()
    current.wait_stream(beside)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):  # other threads go on loading masks
        output = run()

    def repeat() -> Tensor:
        graph.replay()
        return output

    return repeat


@cache
def _pool() -> Any:
    """Memory that all graphs share: no two of them run at once."""
    return torch.cuda.graph_pool_handle()


def _sizes(running: int) -> list[int]:
    """Powers of two, up to what holds all running requests."""
    return [1 << power for power in range((running - 1).bit_length() + 1)]
