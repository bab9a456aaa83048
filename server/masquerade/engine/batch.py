"""The inputs of one step: chunks of many requests packed into one row of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from masquerade.engine import row_groups
from masquerade.engine.attention import AttentionPlan
from masquerade.engine.cuda import attention as cuda_attention
from masquerade.engine.embedding import EmbeddedRows
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.row_groups import NativeRows
from masquerade.engine.scheduler import Chunk
from masquerade.kernels import PagedStep
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
    chunks: Sequence[Chunk], block_table: Index, caches: Sequence[KVCache], make_route: Callable[[list[Span]], Route]
) -> Batch:
    """Pack chunks in their order, decodes first. `block_table` has the blocks of every batch index; `make_route` makes
    the route from the rows under masks. There is a cache for the layers of each device.
    """
    ids: list[int] = []
    decode_positions: list[int] = []
    decode_indices: list[int] = []
    logit_rows: list[int] = []
    spans: list[Span] = []
    embedded: list[EmbeddedRows] = []
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
            ids += chunk.ids
            prefill_positions.append(np.arange(start, stop))
            prefill_indices.append(np.full(stop - start, request.batch_index))
        if request.prompt_logprobs is not None:
            logit_rows += [row + position - start for position in chunk.scored]
        logit_rows += range(len(ids) - chunk.num_sampled, len(ids))
        if request.embedding is not None:
            embedded.append(EmbeddedRows(request.embedding, row, len(ids), start))
    positions = _join(np.array(decode_positions, np.int64), prefill_positions)
    blocks = block_table[_join(np.array(decode_indices, np.int64), prefill_indices), positions // BLOCK_SIZE]
    cache = caches[0]
    slots = cache.slots(blocks, positions % BLOCK_SIZE)
    plan, *others = [_plan(chunks, block_table, each, slots) for each in caches]
    return Batch(
        cache.to_device(np.array([ids], np.int64)),
        cache.to_device(positions[None]),
        make_route(spans),
        replace(plan, elsewhere={each.cache.device: each for each in others}) if others else plan,
        cache.to_device(np.array(logit_rows, np.int64)),
        embedded,
    )


def _plan(chunks: Sequence[Chunk], block_table: Index, cache: KVCache, slots: Index) -> AttentionPlan:
    """The plan for the layers of one cache."""
    slot_mapping = cache.to_device(slots)
    rows = cuda_attention if cuda_attention.is_available(cache.device) else row_groups
    groups = rows.group_rows(chunks, block_table, cache)
    native = next((group for group in groups if isinstance(group, NativeRows)), None)
    paged = PagedStep(native.paged, slot_mapping, cache.keys, cache.values) if native else None
    return AttentionPlan(cache, slot_mapping, groups, paged)


def _join(decodes: Index, prefills: Sequence[Index]) -> Index:
    return np.concatenate([decodes, *prefills]) if prefills else decodes
