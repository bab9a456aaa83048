"""The row groups of a step on a CPU: all rows at once on the native kernel, or groups of similar rows on torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from masquerade.engine.attention import AttentionCall, DecodeRows, PrefillRows, RowGroup
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.kernels import PagedChunks, attend_chunks, attends


@dataclass(frozen=True)
class NativeRows:
    """All rows of a step. Layers whose attention is more than scaled products leave them to torch."""

    chunks: Sequence[Chunk]
    block_table: Index  # the blocks of every batch index
    cache: KVCache
    start: int = 0

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.paged.num_rows

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `RowGroup`. The native kernel is faster than torch for every number of rows and positions
        (docs/performance.md).
        """
        if call.scores.fit_sdpa(self.paged.longest):
            keys, values = call.cache.layers[call.layer]
            return attend_chunks(q, keys, values, call.cache.kv_heads, self.paged, call.scores.scale)
        return torch.cat([group.attend(q[group.start : group.stop], call) for group in self._groups])

    @cached_property
    def paged(self) -> PagedChunks:
        """The rows as the native kernels take them."""
        indices = [chunk.request.batch_index for chunk in self.chunks]
        rows = np.array([chunk.stop - chunk.start for chunk in self.chunks])
        lengths = np.array([chunk.stop for chunk in self.chunks])
        return PagedChunks(self.block_table[indices, : -(-int(lengths.max()) // BLOCK_SIZE)], rows, lengths)

    @cached_property
    def _groups(self) -> Sequence[RowGroup]:
        return [*group_for_torch(self.chunks, self.block_table, self.cache)]


def group_rows(chunks: Sequence[Chunk], block_table: Index, cache: KVCache) -> Sequence[RowGroup]:
    """The row groups of a step: its decodes, which come first, and its prompts. `block_table` has the blocks of every
    batch index.
    """
    if attends(cache.keys):
        return [NativeRows(chunks, block_table, cache)]
    return [*group_for_torch(chunks, block_table, cache)]


def group_for_torch(chunks: Sequence[Chunk], block_table: Index, cache: KVCache) -> Iterator[RowGroup]:
    """Decodes of similar length together, and every prompt by itself."""
    decodes = [chunk for chunk in chunks if chunk.is_decode or chunk.draft]
    positions = [position for chunk in decodes for position in range(chunk.start, chunk.stop)]
    indices = [chunk.request.batch_index for chunk in decodes for _ in range(chunk.start, chunk.stop)]
    yield from _group_decodes(positions, block_table, np.array(indices, np.int64), cache)
    row = len(positions)
    for chunk in chunks[len(decodes) :]:
        yield _prefill(chunk, row, block_table, cache)
        row += chunk.stop - chunk.start


def _prefill(chunk: Chunk, row: int, block_table: Index, cache: KVCache) -> PrefillRows:
    stop_row = row + chunk.stop - chunk.start
    if chunk.start == 0:
        return PrefillRows(row, stop_row, None, None)
    blocks = block_table[chunk.request.batch_index, : -(-chunk.stop // BLOCK_SIZE)]
    mask = cache.attention_mask(np.arange(chunk.start + 1, chunk.stop + 1), len(blocks))
    return PrefillRows(row, stop_row, cache.to_device(cache.head_blocks(blocks)), mask)


def _group_decodes(
    positions: Sequence[int], block_table: Index, indices: Index, cache: KVCache
) -> Iterator[DecodeRows]:
    """Group decode rows of similar length, so that padding stays within bounds."""
    lengths = np.array(positions, np.int64) + 1
    num_blocks = [position // BLOCK_SIZE + 1 for position in positions]
    for first, last, most in _cut(num_blocks):
        head_blocks = cache.to_device(cache.head_blocks(block_table[indices[first:last], :most]).reshape(-1))
        mask = cache.attention_mask(lengths[first:last], most).view(last - first, 1, 1, -1)
        yield DecodeRows(first, last, head_blocks, mask)


def _cut(num_blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Groups of rows: the first, the one after the last, and the blocks of the longest."""
    first = 0
    while first < len(num_blocks):
        least, most, last = min(num_blocks[first:]), max(num_blocks[first:]), len(num_blocks)
        if _differ(least, most):
            least, most, last = num_blocks[first], num_blocks[first], first + 1
            while not _differ(min(least, num_blocks[last]), max(most, num_blocks[last])):
                least, most, last = min(least, num_blocks[last]), max(most, num_blocks[last]), last + 1
        yield first, last, most
        first = last


def _differ(least: int, most: int) -> bool:
    return most > 2 * least + 4
