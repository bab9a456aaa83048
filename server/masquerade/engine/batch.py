"""The inputs of one step: chunks of many requests packed into one row of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from masquerade.engine.attention import AttentionPlan, DecodeRows, PrefillRows, RowGroup
from masquerade.engine.cuda import attention as cuda_attention
from masquerade.engine.embedding import EmbeddedRows
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.model import Route, Span


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward pass."""

    ids: Tensor  # int64 [1, rows]
    positions: Tensor  # int64 [1, rows]
    route: Route
    plan: AttentionPlan
    logit_rows: Tensor  # rows whose logits are needed, in the order of rows: int64 [logit rows]
    embedded: Sequence[EmbeddedRows]


def pack(
    chunks: Sequence[Chunk], block_table: Index, cache: KVCache, make_route: Callable[[list[Span]], Route]
) -> Batch:
    """Pack chunks in their order, decodes first. `block_table` has the blocks of every batch index; `make_route` makes
    the route from the rows under masks.
    """
    ids: list[int] = []
    decode_positions: list[int] = []
    decode_indices: list[int] = []
    logit_rows: list[int] = []
    spans: list[Span] = []
    embedded: list[EmbeddedRows] = []
    prefills: list[tuple[Chunk, int]] = []  # with their first rows
    prefill_positions: list[Index] = []
    prefill_indices: list[Index] = []
    for chunk in chunks:
        request, start, stop = chunk[:3]
        row = len(ids)
        if request.applied is not None:
            spans += request.masked_spans(start, stop, row)
        if stop - start == 1 or chunk.draft:  # the positions of a draft are rows like other decodes, and round alike
            ids += chunk.ids
            decode_positions += range(start, stop)
            decode_indices += [request.batch_index] * (stop - start)
        else:
            prefills.append((chunk, row))
            ids += chunk.ids
            prefill_positions.append(np.arange(start, stop))
            prefill_indices.append(np.full(stop - start, request.batch_index))
        if request.prompt_logprobs is not None:
            logit_rows += [row + position - start for position in chunk.scored]
        logit_rows += range(len(ids) - chunk.num_sampled, len(ids))
        if request.embedding is not None:
            embedded.append(EmbeddedRows(request.embedding, row, len(ids), start))
    decoding = np.array(decode_indices, np.int64)
    positions = _join(np.array(decode_positions, np.int64), prefill_positions)
    blocks = block_table[_join(decoding, prefill_indices), positions // BLOCK_SIZE]
    slots = cache.slots(blocks, positions % BLOCK_SIZE)
    groups: list[RowGroup]
    if cuda_attention.is_available(cache.device):
        groups = cuda_attention.group_rows(chunks, block_table, cache)
    else:
        groups = [*_group_decodes(decode_positions, block_table, decoding, cache)]
        groups += [_prefill(chunk, row, block_table, cache) for chunk, row in prefills]
    return Batch(
        cache.to_device(np.array([ids], np.int64)),
        cache.to_device(positions[None]),
        make_route(spans),
        AttentionPlan(cache, cache.to_device(slots), groups),
        cache.to_device(np.array(logit_rows, np.int64)),
        embedded,
    )


def _join(decodes: Index, prefills: Sequence[Index]) -> Index:
    return np.concatenate([decodes, *prefills]) if prefills else decodes


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
