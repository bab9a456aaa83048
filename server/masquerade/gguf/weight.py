"""One weight of a transformers checkpoint, dequantised row by row from a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from masquerade.gguf.file import GgufTensor

CHUNK = 2**17  # values that are dequantised at a time: they stay in a processor's cache
_NAN = 0x7FC0


@dataclass(frozen=True)
class Weight:
    """A weight in bfloat16 under transformers' name. It is a `maskstore.BaseTensor` with the checkpoint's bytes."""

    name: str
    shape: tuple[int, ...]
    tensor: GgufTensor
    head_dim: int = 0  # rows of a head whose halves llama.cpp interleaves, or 0
    offset: float = 0.0  # llama.cpp adds it to every value
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Bytes in a checkpoint."""
        return 2 * prod(self.shape)

    def chunks(self) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """All rows in chunks: begin, end, and their values before they are rounded: [end - begin, columns]."""
        rows, columns = self._matrix
        step = max(1, CHUNK // columns)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield begin, end, self._dequantize(np.arange(begin, end))

    def blocks(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Rows as the file has them: the bytes of their blocks, [end - begin, bytes of a row]."""
        return self._stored(np.arange(begin, end))

    def read(self, spans: Sequence[tuple[int, int]]) -> bytes:
        """Spans of bytes of the checkpoint's tensor; dequantises their rows."""
        width = 2 * self._matrix[1]
        covers = [np.arange(begin // width, -(-end // width)) for begin, end in spans]
        rows = round_to_bfloat16(self._dequantize(np.concatenate(covers))).astype("<u2", copy=False).tobytes()
        found, at = [], 0
        for (begin, end), cover in zip(spans, covers, strict=True):
            first = at + begin % width
            found.append(rows[first : first + end - begin])
            at += width * len(cover)
        return b"".join(found)

    def _dequantize(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Rows as float32: [rows, columns]. A vector has one value per row."""
        raw = self._stored(rows).reshape(1, -1)  # gguf works on 16 rows at a time: one takes half the time
        with np.errstate(all="ignore"):  # the file may hold infinities
            values = dequantize(raw, self.tensor.kind).reshape(len(rows), -1)
            return values - np.float32(self.offset) if self.offset else values

    def _stored(self, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
        stored = self.tensor.map().reshape(self.shape[0], -1)
        if self.head_dim:
            number, row = np.divmod(rows, self.head_dim)
            half, position = np.divmod(row, self.head_dim // 2)
            rows = self.head_dim * number + 2 * position + half
        return stored[rows]

    @property
    def _matrix(self) -> tuple[int, int]:
        rows, *columns = self.shape
        return rows, prod(columns)


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even, as torch rounds. All NaNs become one."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(_NAN), rounded)


@cache
def is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether gguf can dequantise this type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
