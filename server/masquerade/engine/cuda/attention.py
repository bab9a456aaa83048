"""The row groups of a step on a CUDA device: decodes read straight from the cache blocks, prompts are packed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from masquerade.engine.attention import AttentionCall, DecodeRows, RowGroup, attend_request
from masquerade.engine.kv_cache import Index, KVCache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.scheduler import Chunk
from masquerade.kernels.cuda import find_kernels


@cache
def find_paged() -> Any | None:
    """The module of the paged kernel, or None without triton, which `find_kernels` logs."""
    return importlib.import_module("masquerade.engine.cuda.paged") if find_kernels() is not None else None


def is_available(device: torch.device) -> bool:
    """Whether steps on a device consist of these row groups."""
    return device.type == "cuda" and find_paged() is not None


@dataclass(frozen=True)
class PagedDecodeRows:
    """Rows [start, stop) are one position each. The tensors may be rewritten between steps."""

    start: int
    stop: int
    block_table: Tensor  # int32 [rows, blocks]
    lengths: Tensor  # positions of every row, its own included: int32 [rows]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `RowGroup`."""
        kv, paged = call.cache, find_paged()
        if paged is None or not call.scores.fit_sdpa(self.block_table.shape[1] * BLOCK_SIZE):
            return self._gather(kv).attend(q, call)
        keys, values = kv.keys[call.layer], kv.values[call.layer]
        out: Tensor = paged.decode(q, keys, values, kv.kv_heads, self.block_table, self.lengths, call.scores.scale)
        return out

    def _gather(self, kv: KVCache) -> DecodeRows:
        """The same rows, for attention that gathers keys and values first."""
        heads = torch.arange(kv.kv_heads, device=self.block_table.device)
        head_blocks = self.block_table.long()[:, None, :] * kv.kv_heads + heads[:, None]  # [rows, kv heads, blocks]
        positions = torch.arange(self.block_table.shape[1] * BLOCK_SIZE, device=self.block_table.device)
        padding = positions >= self.lengths[:, None]
        mask = torch.zeros_like(padding, dtype=kv.keys.dtype).masked_fill_(padding, float("-inf"))
        return DecodeRows(self.start, self.stop, head_blocks.flatten(), mask[:, None, None])


@dataclass(frozen=True)
class PackedPrefillRows:
    """Rows [start, stop) are chunks of prompts, one after the other."""

    start: int
    stop: int
    slots: Tensor | None  # of all positions up to the chunks' ends: int64 [positions * kv heads]; None: no cached ones
    chunks: Sequence[tuple[int, int]]  # rows of each chunk, and positions up to its end
    row_bounds: Tensor  # int32 [chunks + 1]
    position_bounds: Tensor  # int32 [chunks + 1]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `RowGroup`."""
        k, v = self._read(call)  # [positions, kv heads, head size]
        rows, positions = (max(sizes) for sizes in zip(*self.chunks, strict=True))
        if call.scores.fit_sdpa(positions) and _supports_flash(q):
            packed: Any = varlen_attn(
                q,
                k,
                v,
                self.row_bounds,
                self.position_bounds,
                rows,
                positions,
                scale=call.scores.scale,
                window_size=(-1, 0),  # causal; the last row is the last position
                **_group_heads(varlen_attn),
            )
            return packed  # type: ignore[no-any-return]
        out, row, position = [], 0, 0
        for rows, positions in self.chunks:
            own = slice(position, position + positions)
            chunk_k, chunk_v = (part[own].transpose(0, 1).unsqueeze(0) for part in (k, v))
            mask = _causal_mask(rows, positions, call.cache) if rows < positions else None
            out.append(attend_request(q[row : row + rows], chunk_k, chunk_v, mask, call.scores))
            row, position = row + rows, position + positions
        return torch.cat(out)

    def _read(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if self.slots is None:
            return call.keys[self.start : self.stop], call.values[self.start : self.stop]
        kv, shape = call.cache, (-1, call.cache.kv_heads, call.cache.head_size)
        k, v = (part[call.layer].view(-1, kv.head_size).index_select(0, self.slots) for part in (kv.keys, kv.values))
        return k.view(shape), v.view(shape)


def group_rows(chunks: Sequence[Chunk], block_table: Index, kv: KVCache) -> list[RowGroup]:
    """The row groups of a step: its decodes, which come first, and its prompts. `block_table` has the blocks of every
    batch index.
    """
    count = sum(chunk.is_decode for chunk in chunks)
    groups: list[RowGroup] = []
    if count:
        lengths = np.array([chunk.stop for chunk in chunks[:count]], np.int32)
        rows = block_table[[chunk.request.batch_index for chunk in chunks[:count]], : -(-lengths.max() // BLOCK_SIZE)]
        groups.append(PagedDecodeRows(0, count, kv.to_device(rows.astype(np.int32)), kv.to_device(lengths)))
    if count < len(chunks):
        sizes = [(chunk.stop - chunk.start, chunk.stop) for chunk in chunks[count:]]
        bounds = np.cumsum([(0, 0), *sizes], 0, dtype=np.int32)  # [chunks + 1, 2]
        slots = None
        if any(chunk.start for chunk in chunks[count:]):
            slots = kv.to_device(np.concatenate([_list_slots(chunk, block_table, kv) for chunk in chunks[count:]]))
        tensors = (kv.to_device(np.ascontiguousarray(column)) for column in bounds.T)
        groups.append(PackedPrefillRows(count, count + int(bounds[-1, 0]), slots, sizes, *tensors))
    return groups


def _list_slots(chunk: Chunk, block_table: Index, kv: KVCache) -> Index:
    positions = np.arange(chunk.stop)
    return kv.slots(block_table[chunk.request.batch_index, positions // BLOCK_SIZE], positions % BLOCK_SIZE)


def _supports_flash(q: Tensor) -> bool:
    """Whether torch's flash attention takes such queries [rows, heads, head size]."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[2] % 8 or q.shape[2] > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


@cache
def _group_heads(attend: Callable[..., Any]) -> dict[str, Any]:
    """What lets heads of queries share keys and values in `varlen_attn`; torch 2.11 has no parameter for it."""
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}


def _causal_mask(rows: int, positions: int, kv: KVCache) -> Tensor:
    """The mask of the last `rows` of so many positions."""
    lengths = np.arange(positions - rows + 1, positions + 1)
    return kv.attention_mask(lengths, -(-positions // BLOCK_SIZE))[:, :positions]
