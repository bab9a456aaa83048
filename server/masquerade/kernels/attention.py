"""Causal attention on a CPU, in C++: it reads keys and values from the blocks of a paged cache, without a copy.

A row's result is bit-identical for every composition of the batch, every division of a prompt into chunks and every
number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masquerade.kernels.native import DTYPES, ISAS, find_library, require_library

SIZES = 16  # a head size is a multiple of it


class PagedChunks(NamedTuple):
    """Chunks of consecutive positions, whose last one attends to the first `lengths` positions of its blocks."""

    blocks: NDArray[np.int32]  # [chunks, width]; what is beyond a chunk's length is not read
    starts: NDArray[np.int32]  # the first row of each: [chunks]
    rows: NDArray[np.int32]  # [chunks]
    lengths: NDArray[np.int32]  # [chunks]


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

    Raises `ValueError` if q has another dtype or head size than the cache.
    """
    library, (_, heads, size) = require_library(), q.shape
    if q.dtype != keys.dtype or size != keys.shape[2]:
        raise ValueError(f"queries {tuple(q.shape)} of {q.dtype} do not fit keys {tuple(keys.shape)} of {keys.dtype}")
    q = q.contiguous()
    out = torch.empty_like(q)
    blocks, starts, rows, lengths = chunks
    library.attend(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        blocks.ctypes.data,
        starts.ctypes.data,
        rows.ctypes.data,
        lengths.ctypes.data,
        len(blocks),
        heads,
        kv_heads,
        size,
        blocks.shape[1],
        keys.shape[1],
        scale,
        DTYPES[q.dtype],
        ISAS.index(isa) if isa else library.fastest,
        torch.get_num_threads(),
    )
    return out
