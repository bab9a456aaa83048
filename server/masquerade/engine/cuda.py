"""The parts of a step on a CUDA device: decodes straight from the pages, prompts packed one after the other.

Knows which kernel reads what, and falls back to `attention` for scores that the kernels do not know. Refuses to decide
which requests run.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from masquerade.engine.attention import AttentionCall, Decodes, Part, attend_alone
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.kernels.cuda import find_kernels


@cache
def find_paged() -> Any | None:
    """The module of the paged kernel, or None where there is no triton, of which `kernels` tells."""
    return importlib.import_module("masquerade.engine.paged") if find_kernels() is not None else None


def serves(device: torch.device) -> bool:
    """Whether steps on a device consist of these parts."""
    return device.type == "cuda" and find_paged() is not None


@dataclass(frozen=True)
class PagedDecodes:
    """Rows [start, stop) are one position each. The tensors may be written to between steps."""

    start: int
    stop: int
    table: Tensor  # pages of every row, int32 [rows, pages]
    lengths: Tensor  # positions of every row, its own included, int32 [rows]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `Part`."""
        pages, paged = call.cache, find_paged()
        if paged is None or not call.scores.is_plain(self.table.shape[1] * BLOCK_SIZE):
            return self.gather(pages).attend(q, call)
        keys, values = pages.keys[call.layer], pages.values[call.layer]
        mixed: Tensor = paged.decode(q, keys, values, pages.heads, self.table, self.lengths, call.scores.scale)
        return mixed

    def gather(self, pages: KVCache) -> Decodes:
        """The same rows for attention that reads what was gathered."""
        heads = torch.arange(pages.heads, device=self.table.device)
        parts = self.table.long()[:, None, :] * pages.heads + heads[:, None]  # [rows, heads, pages]
        absent = torch.arange(self.table.shape[1] * BLOCK_SIZE, device=self.table.device) >= self.lengths[:, None]
        return Decodes(self.start, self.stop, parts.flatten(), _bar(absent, pages)[:, None, None])


@dataclass(frozen=True)
class Prompts:
    """Rows [start, stop) are chunks of prompts, one after the other."""

    start: int
    stop: int
    read: Tensor | None  # cache slots of all positions up to the chunks' ends: int64 [positions * kv heads]
    chunks: Sequence[tuple[int, int]]  # rows of each chunk, and its request's positions so far
    row_bounds: Tensor  # int32 [chunks + 1]
    position_bounds: Tensor  # int32 [chunks + 1]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `Part`."""
        k, v = self._past(call)  # [positions, kv heads, size]
        rows, positions = (max(sizes) for sizes in zip(*self.chunks, strict=True))
        if call.scores.is_plain(positions) and _flash_takes(q):
            mixed: Any = varlen_attn(
                q,
                k,
                v,
                self.row_bounds,
                self.position_bounds,
                rows,
                positions,
                scale=call.scores.scale,
                window_size=(-1, 0),  # causal, the last row at the last position
                enable_gqa=True,
            )
            return mixed  # type: ignore[no-any-return]
        mixed, row, position = [], 0, 0
        for rows, positions in self.chunks:
            own = slice(position, position + positions)
            past_k, past_v = (part[own].transpose(0, 1).unsqueeze(0) for part in (k, v))
            mask = self._bar(rows, positions, call.cache)
            mixed.append(attend_alone(q[row : row + rows], past_k, past_v, mask, call.scores))
            row, position = row + rows, position + positions
        return torch.cat(mixed)

    def _past(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if self.read is None:
            return call.keys[self.start : self.stop], call.values[self.start : self.stop]
        pages, shape = call.cache, (-1, call.cache.heads, call.cache.size)
        k, v = (part[call.layer].view(-1, pages.size).index_select(0, self.read) for part in (pages.keys, pages.values))
        return k.view(shape), v.view(shape)

    @staticmethod
    def _bar(rows: int, positions: int, pages: KVCache) -> Tensor | None:
        if rows == positions:
            return None
        place = torch.arange(positions, device=pages.keys.device)
        return _bar(place > place[positions - rows :, None], pages)


def divide(chunks: Sequence[Chunk], table: Index, pages: KVCache) -> tuple[list[Part], list[Part]]:
    """The parts of a step: its decodes, which come first, and its prompts. `table` holds the pages of every seat."""
    count = sum(chunk.is_decode for chunk in chunks)
    decodes: list[Part] = []
    prompts: list[Part] = []
    if count:
        lengths = np.array([chunk.stop for chunk in chunks[:count]], np.int32)
        rows = table[[chunk.request.seat for chunk in chunks[:count]], : -(-lengths.max() // BLOCK_SIZE)]
        decodes.append(PagedDecodes(0, count, _tensor(rows.astype(np.int32), pages), _tensor(lengths, pages)))
    if count < len(chunks):
        sizes = [(chunk.stop - chunk.start, chunk.stop) for chunk in chunks[count:]]
        bounds = np.cumsum([(0, 0), *sizes], 0, dtype=np.int32)  # [chunks + 1, 2]
        read = None
        if any(chunk.start for chunk in chunks[count:]):
            read = _tensor(np.concatenate([_read(chunk, table, pages) for chunk in chunks[count:]]), pages)
        tensors = (_tensor(np.ascontiguousarray(column), pages) for column in bounds.T)
        prompts.append(Prompts(count, count + int(bounds[-1, 0]), read, sizes, *tensors))
    return decodes, prompts


def _read(chunk: Chunk, table: Index, pages: KVCache) -> Index:
    places = np.arange(chunk.stop)
    return pages.slots(table[chunk.request.seat, places // BLOCK_SIZE], places % BLOCK_SIZE)


def _flash_takes(q: Tensor) -> bool:
    """Whether torch's flash attention knows such queries [rows, heads, size]."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] % 8 or q.shape[2] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _bar(absent: Tensor, pages: KVCache) -> Tensor:
    """0 where attention may look, minus infinity where it may not."""
    bar = torch.zeros(absent.shape, dtype=pages.keys.dtype, device=absent.device)
    return bar.masked_fill_(absent, float("-inf"))


def _tensor(array: np.ndarray[Any, Any], pages: KVCache) -> Tensor:
    return torch.from_numpy(array).to(pages.keys.device)
