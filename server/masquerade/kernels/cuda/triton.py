"""The Triton kernels of the masked product: one launch for all masks and gammas of a batch.

`subtract` removes from the outputs what listed weights contributed. `multiply` computes the whole product for batches
with bitmaps and reads each weight and each bit once. A launch serves one Linear, or up to three of the same input whose
weights are merged: their outputs are columns of one tensor, one Linear's after another's. Both kernels find masks
through addresses in a device tensor and rows through tiles, so a captured CUDA graph stays valid when their contents
change. Sums are fp32, in a fixed order, without atomics.

Importing this module needs triton (see `find_kernels`). With TRITON_INTERPRET=1 it also runs on CPU tensors, in fp32
and fp16 (the interpreter's bf16 products are wrong).
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from masquerade.kernels.cuda.tiles import NARROW, Tiles

_PROGRAMS = 256  # two per multiprocessor of a large GPU
_MERGED = 3  # most Linears of one launch


@triton.jit
def _find_part(out, second, third, some_out: tl.constexpr):
    """The Linear of this program's outputs among up to three of `out`, `second` and `third` outputs, the first of its
    outputs, their number, and the place of its first one among the outputs of all.
    """
    block = tl.program_id(1)
    of_second = tl.cdiv(out, some_out)
    of_third = of_second + tl.cdiv(second, some_out)
    part = (block >= of_second).to(tl.int32) + (block >= of_third).to(tl.int32)
    start = block - tl.where(part == 0, 0, tl.where(part == 1, of_second, of_third))
    count = tl.where(part == 0, out, tl.where(part == 1, second, third))
    place = tl.where(part == 0, 0, tl.where(part == 1, out, out + second))
    return part, start * some_out, count, place


@triton.jit
def _subtract(
    x, y, table, slots, rows, strengths, out, second, third, masks, x_row, x_column, y_row,
    wide: tl.constexpr, some_out: tl.constexpr, some_listed: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """`some_out` outputs of one tile, whose rows have one mask; `some_listed` weights of each output at a time."""
    tile = tl.program_id(0)
    slot = tl.load(slots + tile)
    if slot >= 0:
        part, start, count, place = _find_part(out, second, third, some_out)
        entry = table + (part * masks + slot) * 4
        first = tl.load(entry)
        if first != 0:
            bounds = first.to(tl.pointer_type(tl.int32))
            if wide:
                columns = tl.load(entry + 1).to(tl.pointer_type(tl.int32))
            else:
                columns = tl.load(entry + 1).to(tl.pointer_type(tl.uint16))
            values = tl.load(entry + 2).to(tl.pointer_type(x.dtype.element_ty))
            o = start + tl.arange(0, some_out)
            begin = tl.load(bounds + o, mask=o < count, other=0)
            end = tl.load(bounds + o + 1, mask=o < count, other=0)
            row = tl.load(rows + tile * width + tl.arange(0, width))  # -1: none
            sums = tl.zeros((some_out, width), tl.float32)
            for done in range(0, tl.max(end - begin), some_listed):
                number = begin[:, None] + done + tl.arange(0, some_listed)[None, :]
                listed = number < end[:, None]
                column = tl.load(columns + number, mask=listed, other=0).to(tl.int32)
                value = tl.load(values + number, mask=listed, other=0.0).to(tl.float32)
                at = row[None, None, :].to(tl.int64) * x_row + column[:, :, None].to(tl.int64) * x_column
                read = tl.load(x + at, mask=listed[:, :, None] & (row >= 0)[None, None, :], other=0.0)
                sums += tl.sum(value[:, :, None] * read.to(tl.float32), axis=1)
            strength = tl.load(strengths + row, mask=row >= 0, other=0.0)
            at = row[None, :].to(tl.int64) * y_row + (place + o)[:, None]
            inside = (row >= 0)[None, :] & (o < count)[:, None]
            old = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + at, (old - strength[None, :] * sums).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(words, some_out: tl.constexpr, some_in: tl.constexpr):
    """Bits of words [some_out, some_in / 32], lowest first, as [some_out, some_in] of 0 and 1."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (some_out, some_in))


@triton.jit
def _products(
    x, w, keep, row, o, count, place, inner, words, x_row, w_row,
    soft: tl.constexpr, some_out: tl.constexpr, some_in: tl.constexpr, width: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """Products with the kept weights and, if `soft`, with the pruned ones, [some_out, width] each.

    Every weight enters exactly one of the two, so a hard mask skips pruned weights even if they are not finite.
    """
    kept = tl.zeros((some_out, width), tl.float32)
    gone = tl.zeros((some_out, width), tl.float32)
    k = tl.arange(0, some_in)
    word = tl.arange(0, some_in // 32)
    known = tl.where(keep == 0, 0, words)
    x_at = x + row[None, :].to(tl.int64) * x_row + k[:, None]
    w_at = w + (place + o)[:, None].to(tl.int64) * w_row + k[None, :]
    keep_at = keep.to(tl.pointer_type(tl.int32)) + o[:, None].to(tl.int64) * words + word[None, :]
    for done in range(0, inner, some_in):
        inside = k < inner - done
        read = tl.load(x_at + done, mask=inside[:, None] & (row >= 0)[None, :], other=0.0)
        weight = tl.load(w_at + done, mask=(o < count)[:, None] & inside[None, :], other=0.0)
        masked = (o < count)[:, None] & (word < known - done // 32)[None, :]
        bits = _unpack(tl.load(keep_at + done // 32, mask=masked, other=-1), some_out, some_in)
        kept = tl.dot(tl.where(bits != 0, weight, 0.0).to(weight.dtype), read, kept, input_precision=exact)
        if soft:
            gone = tl.dot(tl.where(bits != 0, 0.0, weight).to(weight.dtype), read, gone, input_precision=exact)
    return kept, gone


@triton.jit
def _multiply(
    x, w, bias, y, table, slots, rows, strengths, out, second, third, masks, inner, words, x_row, w_row, y_row,
    biased: tl.constexpr, some_out: tl.constexpr, some_in: tl.constexpr, width: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """`some_out` outputs of one tile, whose rows have one bitmap or none, over all inputs."""
    tile = tl.program_id(0)  # consecutive programs read the same weights
    row = tl.load(rows + tile * width + tl.arange(0, width))  # -1: none
    if tl.max(row) >= 0:
        slot = tl.load(slots + tile)
        part, start, count, place = _find_part(out, second, third, some_out)
        keep = tl.load(table + (part * masks + slot) * 4 + 3, mask=slot >= 0, other=0)
        strength = tl.load(strengths + row, mask=row >= 0, other=1.0)
        o = start + tl.arange(0, some_out)
        if (keep != 0) & (tl.min(strength) < 1):
            kept, gone = _products(
                x, w, keep, row, o, count, place, inner, words, x_row, w_row, True, some_out, some_in, width, exact
            )  # fmt: skip
            total = tl.where((strength < 1)[None, :], kept + (1 - strength)[None, :] * gone, kept)
        else:
            total, _ = _products(
                x, w, keep, row, o, count, place, inner, words, x_row, w_row, False, some_out, some_in, width, exact
            )  # fmt: skip
        if biased:
            total += tl.load(bias + place + o, mask=o < count, other=0.0).to(tl.float32)[:, None]
        at = row[None, :].to(tl.int64) * y_row + (place + o)[:, None]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=(row >= 0)[None, :] & (o < count)[:, None])


def subtract(x: Tensor, y: Tensor, outs: Sequence[int], table: Tensor, tiles: Tiles, strengths: Tensor) -> None:
    """y -= strength * x (W * (1 - M))ᵀ for the listed masks of a batch, in place.

    x is [rows, in], y [rows, sum of outs] with unit stride, `outs` the outputs of each Linear, `table` int64 [Linears,
    slots, FIELDS], `strengths` fp32 [rows]. Rows in no tile, and rows of slots without a list, do not change.
    """
    count, width = tiles.rows.shape
    some_out = 64 if width == 1 else 8
    columns = x if width == 1 else x.T.contiguous().T  # neighbouring rows read the same column
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _subtract[(count, _count_blocks(outs, some_out))](
            columns, y, table, tiles.slots, tiles.rows, strengths,
            *_pad(outs), table.shape[1], columns.stride(0), columns.stride(1), y.stride(0),
            wide=x.shape[1] > NARROW, some_out=some_out, some_listed=16, width=width,
        )  # fmt: skip


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, outs: Sequence[int], table: Tensor, tiles: Tiles,
    strengths: Tensor,
) -> None:  # fmt: skip
    """y = x (W * (M + gamma (1 - M)))ᵀ + bias for a batch with bitmaps; into y [rows, out].

    x is [rows, in] and `weight` [out, in], all with unit stride; `outs` has the outputs of each Linear, whose sum is
    `out`. `tiles` holds every row, also those without a bitmap. `table` is int64 [Linears, slots, FIELDS], `strengths`
    (1 - gamma) fp32 [rows]. Tiles have 16 rows or more.
    """
    (count, width), (out, inner) = tiles.rows.shape, weight.shape
    program = _choose(out, width)
    with torch.cuda.device_of(x):
        _multiply[(count, _count_blocks(outs, program.some_out))](
            x, weight, weight if bias is None else bias, y, table, tiles.slots, tiles.rows, strengths,
            *_pad(outs), table.shape[1], inner, 2 * triton.cdiv(inner, 64), x.stride(0), weight.stride(0), y.stride(0),
            biased=bias is not None, width=width, exact="ieee", **program._asdict(),
        )  # fmt: skip


def _count_blocks(outs: Sequence[int], some_out: int) -> int:
    """The programs of a tile: none has outputs of two Linears."""
    return sum(triton.cdiv(out, some_out) for out in outs)


def _pad(outs: Sequence[int]) -> list[int]:
    return [*outs, *[0] * (_MERGED - len(outs))]


class _Program(NamedTuple):
    """The share of one program of `_multiply`, chosen so that nothing spills on sm_90."""

    some_out: int
    some_in: int
    num_warps: int = 4
    num_stages: int = 4


_FEW_ROWS = (_Program(64, 64), _Program(32, 128), _Program(16, 128))
_MANY_ROWS = _Program(64, 64, num_warps=8, num_stages=3)


def _choose(out: int, width: int) -> _Program:
    """Few rows: enough programs to saturate memory. Many rows: large tiles."""
    if width > 16:
        return _MANY_ROWS
    return next((program for program in _FEW_ROWS if out // program.some_out >= _PROGRAMS), _FEW_ROWS[-1])
