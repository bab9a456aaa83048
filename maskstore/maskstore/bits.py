"""Bit packing (LSB first, rows of 8-byte words) and CSR."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Rows = NDArray[np.int32]
Places = NDArray[np.int64]
Cols = NDArray[np.uint16] | NDArray[np.uint32]

BYTE, ROW, NARROW, WIDE = np.dtype("u1"), np.dtype("<i4"), np.dtype("<u2"), np.dtype("<u4")
WORD = np.dtype("<u8")
NARROW_COLUMNS = 1 << 16
SLAB = 1 << 15  # words handled at once: they and their counts stay in cache


def stride(columns: int) -> int:
    """Bytes of a packed row: 8-byte words, so that rows stay aligned under mmap."""
    return 8 * -(-columns // 64)


def column_type(columns: int) -> "np.dtype[Any]":
    """uint16 while every column fits, else uint32."""
    return NARROW if columns <= NARROW_COLUMNS else WIDE


def pack(bits: Bool) -> Bytes:
    """bool[out, in] -> uint8[out, stride(in)], bit j & 7 of byte j >> 3, pad bits zero."""
    rows, columns = bits.shape
    width = stride(columns)
    if columns % 64 == 0:
        return np.packbits(bits, axis=1, bitorder="little")
    packed = np.zeros((rows, width), np.uint8)
    packed[:, : -(-columns // 8)] = np.packbits(bits, axis=1, bitorder="little")
    return packed


def unpack(packed: Bytes, columns: int) -> Bool:
    """uint8[out, stride(in)] -> bool[out, in]."""
    return np.unpackbits(packed, axis=1, count=columns, bitorder="little").view(np.bool_)


def popcount(packed: Bytes) -> int:
    """How many bits are set."""
    words = packed.reshape(-1).view(WORD)
    counts = np.empty(min(SLAB, words.size), np.uint8)
    return sum(count(words[start : start + SLAB], counts) for start in range(0, words.size, SLAB))


def count(slab: NDArray[np.uint64], counts: Bytes) -> int:
    """How many bits are set in at most SLAB words; `counts` is scratch of at least as many bytes."""
    return int(np.bitwise_count(slab, out=counts[: slab.size]).sum(dtype=np.uint32))


def pad_mask(columns: int) -> int:
    """The bits of a row's last word that lie beyond the last column."""
    return 0 if columns % 64 == 0 else (1 << 64) - (1 << columns % 64)


def padded_row(packed: Bytes, columns: int) -> int | None:
    """The first row with a pad bit set, or None."""
    mask = pad_mask(columns)
    if not mask:
        return None
    last = packed.view(WORD)[:, -1]
    bad = np.flatnonzero(last & np.uint64(mask))
    return int(bad[0]) if bad.size else None


def to_csr(pruned: Bool) -> tuple[Rows, Cols]:
    """bool[out, in] -> rows int32[out + 1], cols[pruned], ascending within a row."""
    out, columns = pruned.shape
    return split_places(np.flatnonzero(pruned), out, columns)


def split_places(places: Places, out: int, columns: int) -> tuple[Rows, Cols]:
    """Ascending positions in the flattened module -> rows, cols."""
    owners = places // columns
    rows = np.zeros(out + 1, ROW)
    np.cumsum(np.bincount(owners, minlength=out), out=rows[1:])
    return rows, (places - owners * columns).astype(column_type(columns))


def join_places(rows: Rows, cols: Cols, columns: int) -> Places:
    """Rows, cols -> ascending positions in the flattened module."""
    starts = np.arange(rows.size - 1, dtype=np.int64) * columns
    return np.repeat(starts, np.diff(rows)) + cols


def from_csr(rows: Rows, cols: Cols, columns: int) -> Bool:
    """CSR of the pruned -> bool[out, in], True where pruned."""
    pruned = np.zeros((rows.size - 1) * columns, np.bool_)
    pruned[join_places(rows, cols, columns)] = True
    return pruned.reshape(-1, columns)
