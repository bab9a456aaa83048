"""Causal attention on a CPU, in C++: it reads keys and values from the blocks of a paged cache, without a copy.

A row's result is bit-identical for every composition of the batch, every division of a prompt into chunks and every
number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masquerade.kernels.native import DTYPES, ISAS, check_memory, find_library, require_library

SIZES = 16  # a head size is a multiple of it
WALKED = 64  # positions that are read at a time; blocks divide it


class PagedChunks:
    """Chunks of consecutive positions, packed one after the other. Laid out once for all layers."""

    def __init__(self, blocks: NDArray[np.integer], rows: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """The last of a chunk's `rows` [chunks] attends to the first `lengths` [chunks] positions of its blocks, the
        row before to one less; `blocks` is [chunks, width], and what is beyond a chunk's length is not read.
        """
        counts = np.array([np.cumsum(rows) - rows, rows, lengths], np.int32)  # starts, rows, lengths
        self._arrays = np.ascontiguousarray(blocks, np.int32), counts  # keeps what the addresses point to
        self.count, self.width = blocks.shape
        self.num_rows = int(rows.sum())
        self.longest = int(lengths.max())
        self.addresses = self._arrays[0].ctypes.data, *(part.ctypes.data for part in counts)


def check_block(positions: int) -> None:
    """Raises `ValueError` for a cache with so many positions in a block; what is beyond 64 would not be found."""
    if positions % 4 or WALKED % positions:
        raise ValueError(f"blocks of {positions} positions: the library reads blocks of 4, 8, 16, 32 or 64")


def attends(keys: Tensor) -> bool:
    """Whether the library supports a cache with such keys [..., head size]: fp32 or bf16 on the CPU."""
    supported = keys.device.type == "cpu" and keys.dtype in DTYPES and keys.shape[-1] % SIZES == 0
    return supported and find_library() is not None


def attend_chunks(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    kv_heads: int,
    chunks: PagedChunks,
    scale: float,
    isa: str | None = None,
) -> Tensor:
    """Attention of q [rows, heads, head size], in its shape and dtype; the chunks cover all rows. `keys` and `values`
    are [blocks * kv heads, positions of a block, head size]. `isa` as in `NativeProduct`.

    Raises `ValueError` if q has another number of rows than the chunks, or another dtype or head size than the cache,
    or for blocks that the library does not read (`check_block`), and `MemoryError` if there is no memory.
    """
    library, (rows, heads, size), (_, positions, key_size) = require_library(), q.shape, keys.shape
    check_block(positions)
    if q.dtype != keys.dtype or size != key_size or rows != chunks.num_rows:
        raise ValueError(
            f"queries {tuple(q.shape)} of {q.dtype} do not fit {chunks.num_rows} rows and keys {tuple(keys.shape)} of "
            f"{keys.dtype}"
        )
    q = q.contiguous()
    out = torch.empty_like(q)
    outcome = library.attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        *chunks.addresses,
        chunks.count,
        heads,
        kv_heads,
        size,
        chunks.width,
        positions,
        scale,
        DTYPES[q.dtype],
        ISAS.index(isa) if isa else library.fastest,
        torch.get_num_threads(),
    )
    check_memory(outcome)
    return out
