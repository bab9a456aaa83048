"""Attention of decode steps as Triton kernels that read keys and values straight from the cache blocks.

A program of the first kernel computes a split of one row's context for one key-value head; the second kernel combines
the splits (flash decoding). All inputs are device tensors of fixed shape, so CUDA graphs can capture the kernels. Soft
caps, sinks and sliding windows are not supported; `attention.eager_attention` has them.

Importing this module needs triton. With TRITON_INTERPRET=1 it also runs on CPU tensors, in fp32 and fp16.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 264  # two for each multiprocessor of a large GPU
_MAX_SPLITS = 16  # of a row's context


@triton.jit
def _attend(
    q, keys, values, table, lengths, partial, weights, scale, q_row, q_head, table_row, kv_heads, splits,
    repeat: tl.constexpr, size: tl.constexpr, cache_block: tl.constexpr, tile: tl.constexpr,
    heads: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """A split of one row's context, for the `repeat` query heads of one key-value head (flash decoding, Dao et al.
    2023). A cache block is `cache_block` positions; a loop step reads `tile` positions.

    `heads` and `width` are `repeat` and `size` rounded up to what a matrix product takes. `partial` is fp32 [rows, kv
    heads * repeat, splits, size], each split normalised by itself; `weights` has its log sum of exponentials.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    span = tl.cdiv(tl.cdiv(length, splits), tile) * tile
    head = tl.arange(0, heads)
    d = tl.arange(0, width)
    n = tl.arange(0, tile)
    query = tl.load(
        q + row * q_row + (kv_head * repeat + head)[:, None] * q_head + d[None, :],
        mask=(head < repeat)[:, None] & (d < size)[None, :],
        other=0.0,
    )
    highest = tl.full((heads,), float("-inf"), tl.float32)
    total = tl.zeros((heads,), tl.float32)
    sums = tl.zeros((heads, width), tl.float32)
    for start in range(split * span, tl.minimum(length, (split + 1) * span), tile):
        valid = start + n < length
        block = tl.load(table + row * table_row + (start + n) // cache_block, mask=valid, other=0).to(tl.int64)
        at = ((block * kv_heads + kv_head) * cache_block + (start + n) % cache_block) * size
        inside = valid[:, None] & (d < size)[None, :]
        key = tl.load(keys + at[:, None] + d[None, :], mask=inside, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # [heads, tile]
        score = tl.where(valid[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        exponent = tl.exp(score - higher[:, None])
        rescale = tl.exp(highest - higher)
        value = tl.load(values + at[:, None] + d[None, :], mask=inside, other=0.0)
        total = total * rescale + tl.sum(exponent, axis=1)
        sums = tl.dot(exponent.to(value.dtype), value, sums * rescale[:, None], input_precision="ieee")
        highest = higher
    used = total > 0  # a short context has fewer splits
    to = ((row * kv_heads + kv_head) * repeat + head) * splits + split
    tl.store(weights + to, tl.where(used, highest + tl.log(tl.where(used, total, 1.0)), float("-inf")), head < repeat)
    tl.store(
        partial + to[:, None] * size + d[None, :],
        sums / tl.where(used, total, 1.0)[:, None],
        mask=(head < repeat)[:, None] & (d < size)[None, :],
    )


@triton.jit
def _combine(
    partial, weights, out, splits: tl.constexpr, size: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """Combine the splits of one row's head, each weighted by its part of the sum; the first split is never empty."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, splits)
    d = tl.arange(0, width)
    weight = tl.load(weights + head * splits + split)
    weight = tl.exp(weight - tl.max(weight))
    parts = tl.load(partial + (head * splits + split)[:, None] * size + d[None, :], mask=(d < size)[None, :], other=0.0)
    total = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight)
    tl.store(out + head * size + d, total.to(out.dtype.element_ty), mask=d < size)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, kv_heads: int, block_table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of one position a row, q [rows, heads, head size], to the row's own context; in the shape of q.

    keys and values are one layer's [blocks * kv heads, BLOCK_SIZE, head size], `block_table` is int32 [rows, blocks],
    `lengths` int32 [rows], at least 1. The query heads of one key-value head are adjacent. Positions beyond a row's
    length are not read.
    """
    rows, heads, size = q.shape
    q = q if q.stride(2) == 1 else q.contiguous()
    repeat, width = heads // kv_heads, max(16, triton.next_power_of_2(size))
    splits = _count_splits(rows * kv_heads)
    partial = q.new_empty(rows, heads, splits, size, dtype=torch.float32)
    weights = q.new_empty(rows, heads, splits, dtype=torch.float32)
    out = q.new_empty(rows, heads, size)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _attend[(rows, kv_heads, splits)](
            q, keys, values, block_table, lengths, partial, weights, scale,
            q.stride(0), q.stride(1), block_table.stride(0), kv_heads, splits,
            repeat=repeat, size=size, cache_block=keys.shape[1], tile=64,
            heads=max(16, triton.next_power_of_2(repeat)), width=width,
        )  # fmt: skip
        _combine[(rows * heads,)](partial, weights, out, splits=splits, size=size, width=width)
    return out


def _count_splits(programs: int) -> int:
    """The splits of each context that keep the whole device busy."""
    return min(_MAX_SPLITS, int(triton.next_power_of_2(triton.cdiv(_PROGRAMS, 2 * programs))))
