"""Attention of decode steps on CUDA, straight from the pages: nothing is gathered first.

Knows one kernel, which gives a program a row, a head of keys and a share of the row's context, and a second one, which
puts the shares together. Every number of it is in device tensors of fixed shape, so CUDA graphs can hold it. Refuses to
know requests, and scores that are changed after the product (soft caps, sinks): those have `attention.mix`.

Importing this module needs triton. With TRITON_INTERPRET=1 it also runs on CPU tensors, in fp32 and fp16.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 264  # two for each multiprocessor of a large GPU
_SHARES = 16  # at most; each is a program that must be worth starting


@triton.jit
def _attend(
    q, keys, values, table, lengths, mixed, weights, scale, q_row, q_head, table_row, kv_heads, shares,
    repeat: tl.constexpr, size: tl.constexpr, page: tl.constexpr, block: tl.constexpr,
    heads: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """A share of one row's context for the `repeat` query heads of one key head (Dao et al. 2023, flash decoding).

    `heads` and `width` are `repeat` and `size` rounded up to what a product takes. `mixed` is fp32 [rows, kv heads *
    repeat, shares, size], each share normalised by itself; `weights` its log sum of exponentials.
    """
    row, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    part = tl.cdiv(tl.cdiv(length, shares), block) * block
    head = tl.arange(0, heads)
    d = tl.arange(0, width)
    n = tl.arange(0, block)
    asked = tl.load(
        q + row * q_row + (kv_head * repeat + head)[:, None] * q_head + d[None, :],
        mask=(head < repeat)[:, None] & (d < size)[None, :],
        other=0.0,
    )
    most = tl.full((heads,), float("-inf"), tl.float32)
    total = tl.zeros((heads,), tl.float32)
    sums = tl.zeros((heads, width), tl.float32)
    for start in range(share * part, tl.minimum(length, (share + 1) * part), block):
        there = start + n < length
        number = tl.load(table + row * table_row + (start + n) // page, mask=there, other=0).to(tl.int64)
        at = ((number * kv_heads + kv_head) * page + (start + n) % page) * size
        inside = there[:, None] & (d < size)[None, :]
        key = tl.load(keys + at[:, None] + d[None, :], mask=inside, other=0.0)
        score = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale  # [heads, block]
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        exponent = tl.exp(score - higher[:, None])
        shrunk = tl.exp(most - higher)
        value = tl.load(values + at[:, None] + d[None, :], mask=inside, other=0.0)
        total = total * shrunk + tl.sum(exponent, axis=1)
        sums = tl.dot(exponent.to(value.dtype), value, sums * shrunk[:, None], input_precision="ieee")
        most = higher
    seen = total > 0  # a short context has fewer shares
    to = ((row * kv_heads + kv_head) * repeat + head) * shares + share
    tl.store(weights + to, tl.where(seen, most + tl.log(tl.where(seen, total, 1.0)), float("-inf")), head < repeat)
    tl.store(
        mixed + to[:, None] * size + d[None, :],
        sums / tl.where(seen, total, 1.0)[:, None],
        mask=(head < repeat)[:, None] & (d < size)[None, :],
    )


@triton.jit
def _combine(
    mixed, weights, out, shares: tl.constexpr, size: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """The shares of one row's head, each by its part of the whole sum; the first share is never empty."""
    head = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, shares)
    d = tl.arange(0, width)
    weight = tl.load(weights + head * shares + share)
    weight = tl.exp(weight - tl.max(weight))
    parts = tl.load(mixed + (head * shares + share)[:, None] * size + d[None, :], mask=(d < size)[None, :], other=0.0)
    total = tl.sum(parts * weight[:, None], axis=0) / tl.sum(weight)
    tl.store(out + head * size + d, total.to(out.dtype.element_ty), mask=d < size)


def decode(
    q: Tensor, keys: Tensor, values: Tensor, kv_heads: int, table: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attention of one position a row over its own pages: [rows, heads, size], as q is.

    keys and values are one layer's [pages * kv heads, PAGE, size], `table` int32 [rows, pages], `lengths` int32 [rows],
    at least 1. Query heads of one key head are neighbours. What lies beyond a row's length is never read.
    """
    (rows, heads, size), page = q.shape, keys.shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    repeat, width = heads // kv_heads, max(16, triton.next_power_of_2(size))
    shares = _share(rows * kv_heads)
    mixed = q.new_empty(rows, heads, shares, size, dtype=torch.float32)
    weights = q.new_empty(rows, heads, shares, dtype=torch.float32)
    _attend[(rows, kv_heads, shares)](
        q, keys, values, table, lengths, mixed, weights, scale,
        q.stride(0), q.stride(1), table.stride(0), kv_heads, shares,
        repeat=repeat, size=size, page=page, block=64, heads=max(16, triton.next_power_of_2(repeat)), width=width,
    )  # fmt: skip
    out = q.new_empty(rows, heads, size)
    _combine[(rows * heads,)](mixed, weights, out, shares=shares, size=size, width=width)
    return out


def _share(programs: int) -> int:
    """Into how many shares contexts are cut so that there are programs for the whole device."""
    return min(_SHARES, int(triton.next_power_of_2(triton.cdiv(_PROGRAMS, 2 * programs))))
