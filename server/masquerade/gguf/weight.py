"""One weight of a transformers checkpoint, dequantised row by row from a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from masquerade.gguf.file import GgufTensor

CHUNK = 2**20  # values that are dequantised at a time
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

    def chunks(self) -> Iterator[tuple[int, int, NDArray[np.uint16]]]:
        """All rows in chunks: begin, end, and their values."""
        rows, columns = self._matrix
        step = max(1, CHUNK // columns)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield begin, end, self.rows(begin, end)

    def rows(self, begin: int, end: int) -> NDArray[np.uint16]:
        """Rows as bfloat16: [end - begin, columns]. A vector has one value per row."""
        rows, _ = self._matrix
        width = self.tensor.nbytes // rows
        stored: NDArray[Any] = np.memmap(self.tensor.path, np.uint8, "r", self.tensor.begin, (rows, width))
        if self.head_dim:
            number, row = np.divmod(np.arange(begin, end), self.head_dim)
            half, position = np.divmod(row, self.head_dim // 2)
            raw = stored[self.head_dim * number + 2 * position + half]
        else:
            raw = np.ascontiguousarray(stored[begin:end])
        with np.errstate(all="ignore"):  # the file may hold infinities
            return round_to_bfloat16(dequantize(raw, self.tensor.kind) - np.float32(self.offset))

    def read(self, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` of the checkpoint's tensor; dequantises their rows."""
        columns = 2 * self._matrix[1]
        first = begin // columns
        rows = self.rows(first, -(-end // columns))
        return rows.astype("<u2", copy=False).tobytes()[begin - first * columns : end - first * columns]

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
