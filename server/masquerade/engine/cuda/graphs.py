"""Decode steps as CUDA graphs: the inputs are in tensors with fixed addresses, and one launch runs the step.

There is one graph for each padded batch size and set of Linears that the batch's masks correct, captured on first use.
Masks, gammas, block tables and positions are data. A padding row has no mask and writes to the scratch block.
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

from masquerade.engine import attention
from masquerade.engine.cuda import attention as cuda_attention
from masquerade.engine.cuda.attention import PagedDecodeRows
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.model import Base, SlotMap, Slots, SlotShape, Span, Staging, find_entries

_log = logging.getLogger(__name__)

MAX_GRAPHS = 32  # the least recently used one is dropped

Run = Callable[[], Tensor]


def prepare(base: Base, kv: KVCache, max_running: int) -> DecodeGraphs | None:
    """The graphs of an engine; None without a CUDA device and its kernels, on several, or if the model's attention
    needs more.
    """
    if not cuda_attention.is_available(base.device) or not attention.fits_sdpa(base.model, base.context):
        return None
    if len(base.devices) > 1:
        _log.warning(
            "decode steps run without CUDA graphs, which is slower: the layers are on %d GPUs", len(base.devices)
        )
        return None
    return DecodeGraphs(base, kv, max_running, capture)


class DecodeInputs:
    """The inputs of decode steps of up to `rows` rows, without the masks."""

    def __init__(self, rows: int, columns: int, kv: KVCache) -> None:
        i32, i64 = torch.int32, torch.int64
        self._kv = kv
        self._shape = rows, columns
        self._staging = Staging(
            {
                "ids": (i64, (1, rows)),
                "positions": (i64, (1, rows)),
                "slot_mapping": (i64, (rows * kv.kv_heads,)),
                "block_table": (i32, (rows, columns)),
                "lengths": (i32, (rows,)),
            },
            kv.device,
        )
        tensors = self._staging.tensors
        self.ids, self.positions = tensors["ids"], tensors["positions"]
        decodes = PagedDecodeRows(0, rows, tensors["block_table"], tensors["lengths"])
        self.plan = attention.AttentionPlan(kv, tensors["slot_mapping"], [decodes])

    def write(self, chunks: Sequence[Chunk], block_table: Index) -> None:
        """Set the inputs to these decodes. `block_table` has the blocks of every batch index."""
        (rows, columns), count = self._shape, len(chunks)
        ids, positions, lengths = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.ones(rows, np.int32)
        table = np.zeros((rows, columns), np.int32)
        ids[:count] = [chunk.request.ids[chunk.start] for chunk in chunks]
        positions[:count] = [chunk.start for chunk in chunks]
        lengths[:count] = positions[:count] + 1
        used = -(-int(lengths.max()) // BLOCK_SIZE)  # no row reads beyond its length; a context may have many blocks
        table[:count, :used] = block_table[[chunk.request.batch_index for chunk in chunks], :used]
        blocks, offsets = np.full(rows, self._kv.scratch_block), np.arange(rows) % BLOCK_SIZE
        blocks[:count] = table[np.arange(count), positions[:count] // BLOCK_SIZE]
        offsets[:count] = positions[:count] % BLOCK_SIZE
        self._staging.write(
            {
                "ids": ids[None],
                "positions": positions[None],
                "slot_mapping": self._kv.slots(blocks, offsets),
                "block_table": table,
                "lengths": lengths,
            }
        )


@dataclass
class DecodeGraph:
    """One graph, with the tensors of its masks and the version of the slot map that is in them."""

    slots: Slots
    version: int = 0
    run: Run | None = None


class DecodeGraphs:
    """The decode graphs of one engine. `capture` turns a step into a function that repeats it."""

    def __init__(self, base: Base, kv: KVCache, max_running: int, capture: Callable[[Run], Run]) -> None:
        self._base = base
        self._kv = kv
        self._capture = capture
        self._sizes = _batch_sizes(max_running)
        self._columns = -(-min(base.context, kv.positions) // BLOCK_SIZE)
        self._inputs: dict[int, DecodeInputs] = {}
        self._graphs: OrderedDict[SlotShape, DecodeGraph] = OrderedDict()
        self._spans: list[Span] = []
        self._slot_map = SlotMap.of([], 0)
        self._version = 0  # of the slot map

    def run(self, chunks: Sequence[Chunk], block_table: Index) -> Tensor | None:
        """The logits of a step, [chunks, vocabulary], valid until the next one; None if no graph can run it."""
        if not self._sizes or not all(chunk.is_decode and chunk.samples for chunk in chunks):
            return None
        slot_map = self._map_slots(chunks)
        if not all(find_entries(mask) is not None for mask in slot_map.masks):
            return None
        size = next(size for size in self._sizes if size >= len(chunks))
        if size not in self._inputs:
            self._inputs[size] = DecodeInputs(size, self._columns, self._kv)
        self._inputs[size].write(chunks, block_table)
        graph = self._find(slot_map.padded_shape(size))
        if graph.version != self._version:
            graph.slots.write(slot_map)
            graph.version = self._version
        if graph.run is None:
            graph.run = self._make(graph.slots, self._inputs[size])
        return None if graph.run is None else graph.run()[: len(chunks)]

    def release(self) -> None:
        """Drop the references to the masks of the last step. What the graphs have of them stays until they are written
        again.
        """
        if self._spans:
            self._spans, self._slot_map = [], SlotMap.of([], 0)
            self._version += 1

    def _map_slots(self, chunks: Sequence[Chunk]) -> SlotMap:
        """The slot map of a step; the last one if the masks of its rows are the same."""
        spans = [
            span
            for row, chunk in enumerate(chunks)
            if chunk.request.applied is not None
            for span in chunk.request.masked_spans(chunk.start, chunk.stop, row)
        ]
        if spans != self._spans or len(chunks) != len(self._slot_map.slots):
            self._spans, self._slot_map = spans, SlotMap.of(spans, len(chunks))
            self._version += 1
        return self._slot_map

    def _find(self, shape: SlotShape) -> DecodeGraph:
        if shape not in self._graphs:
            self._graphs[shape] = DecodeGraph(Slots(shape, self._base.device))
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        return self._graphs[shape]

    def _make(self, slots: Slots, inputs: DecodeInputs) -> Run | None:
        """A graph over these tensors. They hold a real step: capturing runs it, and the first replay repeats it."""

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
            self._sizes, self._graphs = [], OrderedDict()
            self.release()
            return None


def capture(run: Run) -> Run:
    """Capture what a function does on the device. The returned function repeats it, into the same output."""
    current, side = torch.cuda.current_stream(), _side()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # warm-up: kernels are compiled and libraries allocate memory
        run()
        run()
    current.wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    # thread_local: other threads load masks meanwhile
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@cache
def _side() -> torch.cuda.Stream:
    """The stream of all warm-ups: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


@cache
def _pool() -> Any:
    """Memory that all graphs share: no two of them run at the same time."""
    return torch.cuda.graph_pool_handle()


def _batch_sizes(max_running: int) -> list[int]:
    """Powers of two, up to the first that is at least `max_running`."""
    return [1 << power for power in range((max_running - 1).bit_length() + 1)]
