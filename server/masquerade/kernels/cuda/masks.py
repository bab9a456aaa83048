"""Masks in device memory in the layouts that the Triton kernels read, and which Linears those kernels support."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskstore import Target
from masquerade.kernels.correction import accumulator, bitmap_footprint
from masquerade.kernels.cuda.tiles import COLUMNS, FIELDS, KEEP, NARROW, ROWS, VALUES, Tiles, tile
from masquerade.kernels.weights import share

_log = logging.getLogger(__name__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def find_kernels() -> Any | None:
    """The module of the kernels, or None without triton; logs once which of the two applies."""
    try:
        kernels = importlib.import_module("masquerade.kernels.cuda.triton")
    except ImportError as error:
        _log.warning("masked products run on torch, which is slower: no Triton kernels (%s)", error)
        return None
    _log.info("masked products run on Triton kernels")
    return kernels


def serves(module: nn.Module, device: str | None = None) -> TypeGuard[nn.Linear]:
    """Whether the kernels support a module: a plain fp16, bf16 or fp32 Linear on a CUDA device.

    `device` as in `kernels.choose`; a CUDA device that this machine does not have is taken to have the kernels.
    """
    if type(module) is not nn.Linear or module.weight.dtype not in _DTYPES:
        return False
    if (device or module.weight.device.type) != "cuda":
        return False
    elsewhere = device is not None and not torch.cuda.is_available()
    return module.weight.stride(1) == 1 and (elsewhere or find_kernels() is not None)


class CudaList:
    """Pruned weights in CSR form: column indices of two bytes (four if wide) and values in the base's dtype."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        sparse, weight = target.to_sparse(), linear.weight.detach()
        rows = torch.from_numpy(sparse.rows.astype(np.int32)).to(weight.device)
        columns = torch.from_numpy(sparse.cols.astype(np.int64)).to(weight.device)
        self.shape = target.shape
        narrow = sparse.cols.astype(np.uint16 if target.shape[1] <= NARROW else np.int32, copy=False)
        self._rows = rows  # int32 [out + 1]
        self._columns = share(narrow).to(weight.device)  # [pruned]
        self._values = weight[torch.repeat_interleave(rows.diff()), columns]  # [pruned]

    @staticmethod
    def footprint(linear: nn.Linear, pruned: int) -> int:
        """The `nbytes` of a list of `pruned` weights."""
        column = 2 if linear.in_features <= NARROW else 4
        return 4 * (linear.out_features + 1) + (column + linear.weight.itemsize) * pruned

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return sum(tensor.nbytes for tensor in (self._rows, self._columns, self._values))

    @property
    def addresses(self) -> NDArray[np.int64]:
        """The mask's table entry, int64 [FIELDS]; valid while the mask lives."""
        entry = np.zeros(FIELDS, np.int64)
        entry[[ROWS, COLUMNS, VALUES]] = [part.data_ptr() for part in (self._rows, self._columns, self._values)]
        return entry

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out]."""
        y = x.new_zeros(len(x), self.shape[0], dtype=accumulator(x.dtype))
        table, tiles = _one_mask(self.addresses, len(x), 1, x.device)
        strengths = x.new_full((len(x),), -1.0, dtype=torch.float32)
        _kernels().subtract(x.contiguous(), y, self.shape[:1], table, tiles, strengths)
        return y


class CudaBits:
    """One bit per weight; the weights are the base's."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        self.shape = target.shape
        self._weight = linear.weight
        keep = share(target.to_bitmap().keep).to(linear.weight.device)  # uint8 [out, bytes], lowest bit first
        self._keep = keep.view(torch.int32)  # [out, words]

    footprint = staticmethod(bitmap_footprint)

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return self._keep.nbytes

    @property
    def addresses(self) -> NDArray[np.int64]:
        """The mask's table entry, int64 [FIELDS]; valid while the mask lives."""
        return _entry(self._keep)

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out]."""
        pruned = ~self._keep  # the complement: keeps exactly the pruned weights
        table, tiles = _one_mask(_entry(pruned), len(x), 16, x.device)
        y = x.new_empty(len(x), self.shape[0], dtype=accumulator(x.dtype))
        ones = x.new_ones(len(x), dtype=torch.float32)
        _kernels().multiply(x.contiguous(), self._weight, None, y, self.shape[:1], table, tiles, ones)
        return y


def _kernels() -> Any:
    kernels = find_kernels()
    assert kernels is not None, "serves() was false"
    return kernels


def _entry(keep: Tensor) -> NDArray[np.int64]:
    entry = np.zeros(FIELDS, np.int64)
    entry[KEEP] = keep.data_ptr()
    return entry


def _one_mask(entry: NDArray[np.int64], count: int, width: int, device: torch.device) -> tuple[Tensor, Tiles]:
    """The table and the tiles of a batch for one Linear in which every row has the same mask."""
    slots, rows = tile(np.zeros(count, np.int32), width)
    tiles = Tiles(torch.from_numpy(slots).to(device), torch.from_numpy(rows).to(device))
    return torch.from_numpy(entry[None, None]).to(device), tiles
