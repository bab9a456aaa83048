"""One step's inputs: chunks of many requests packed into one row of tokens.

Knows how chunks become tensors. Refuses to decide which chunks run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masquerade.engine import cuda
from masquerade.engine.attention import AttentionPlan, Decodes, Part, Prefill
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
    sampled: Tensor  # rows whose logits are needed, int64 [samples]


def pack(chunks: Sequence[Chunk], table: Index, cache: KVCache, route: Callable[[list[Span]], Route]) -> Batch:
    """Pack chunks, decodes first, in their order. `table` holds the pages of every seat; `route` makes the route of the
    spans that wear a mask.
    """
    device = cache.keys.device
    ids: list[int] = []
    starts: list[int] = []  # of the decodes
    seats: list[int] = []
    sampled: list[int] = []
    spans: list[Span] = []
    prompts: list[tuple[Chunk, int]] = []  # and their first rows
    position: list[Index] = []  # of the prompts
    seat: list[Index] = []
    for chunk in chunks:
        request, start, stop, samples = chunk
        row = len(ids)
        if request.applied is not None:
            spans += request.masked_spans(start, stop, row)
        if stop - start == 1:
            ids.append(request.ids[start])
            starts.append(start)
            seats.append(request.seat)
        else:
            prompts.append((chunk, row))
            ids += request.ids[start:stop]
            position.append(np.arange(start, stop))
            seat.append(np.full(stop - start, request.seat))
        if samples:
            sampled.append(len(ids) - 1)
    decoding = np.array(seats, np.int64)
    positions = _join(np.array(starts, np.int64), position)
    write = cache.slots(table[_join(decoding, seat), positions // BLOCK_SIZE], positions % BLOCK_SIZE)
    parts: tuple[Sequence[Part], Sequence[Part]]
    if cuda.serves(device):
        parts = cuda.divide(chunks, table, cache)
    else:
        gathered = list(_decodes(starts, table, decoding, cache))
        parts = gathered, [_prefill(chunk, row, table, cache) for chunk, row in prompts]
    return Batch(
        _tensor(np.array([ids], np.int64), device),
        _tensor(positions[None], device),
        route(spans),
        AttentionPlan(cache, _tensor(write, device), *parts),
        _tensor(np.array(sampled, np.int64), device),
    )


def _join(decodes: Index, prefills: Sequence[Index]) -> Index:
    return np.concatenate([decodes, *prefills]) if prefills else decodes


def _prefill(chunk: Chunk, row: int, table: Index, cache: KVCache) -> Prefill:
    stop_row = row + chunk.stop - chunk.start
    if chunk.start == 0:
        return Prefill(row, stop_row, None, None)
    pages = table[chunk.request.seat, : -(-chunk.stop // BLOCK_SIZE)]
    bar = cache.bar(np.arange(chunk.start + 1, chunk.stop + 1), len(pages))
    return Prefill(row, stop_row, _tensor(cache.parts(pages), cache.keys.device), bar)


def _decodes(starts: Sequence[int], table: Index, seats: Index, cache: KVCache) -> Iterator[Decodes]:
    """Cut the decode rows where one is more than twice as long as another, so that padding stays within bounds."""
    lengths = np.array(starts, np.int64) + 1
    pages = [start // BLOCK_SIZE + 1 for start in starts]
    for first, last, most in _cut(pages):
        parts = _tensor(cache.parts(table[seats[first:last], :most]).reshape(-1), cache.keys.device)
        bar = cache.bar(lengths[first:last], most).view(last - first, 1, 1, -1)
        yield Decodes(first, last, parts, bar)


def _cut(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Groups of rows: the first, the one after the last, and the most pages of one of them."""
    first = 0
    while first < len(pages):
        least, most, last = min(pages[first:]), max(pages[first:]), len(pages)
        if _differ(least, most):
            least, most, last = pages[first], pages[first], first + 1
            while not _differ(min(least, pages[last]), max(most, pages[last])):
                least, most, last = min(least, pages[last]), max(most, pages[last]), last + 1
        yield first, last, most
        first = last


def _differ(least: int, most: int) -> bool:
    return most > 2 * least + 4


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
