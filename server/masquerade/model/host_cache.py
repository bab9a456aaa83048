"""An LRU cache of masks in (page-locked) host memory, between disk and device."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maskstore import Bitmap, Mask, Sparse, Target

Bytes = NDArray[np.uint8]


class HostCache:
    """Copies of masks within a byte budget, evicted least recently used first. Thread-safe.

    Each mask has its own mapping, page-locked if there is a CUDA device, so that memory does not fragment. On a CPU use
    a budget of 0: the system's page cache does the same.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget  # bytes
        self.nbytes = 0  # bytes of copies, finished or in progress
        self.evictions = 0
        self._masks: OrderedDict[str, tuple[Mask, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._masks

    def find(self, digest: str) -> Mask | None:
        """The copy of a mask, or None."""
        with self._lock:
            if digest not in self._masks:
                return None
            self._masks.move_to_end(digest)
            return self._masks[digest][0]

    def keep(self, mask: Mask) -> Mask:
        """Copy a mask into the cache and return the copy, or the mask itself if it is larger than the budget allows."""
        size = sum(_padded(array.nbytes) for target in mask.targets.values() for array in target.tensors.values())
        if not self._reserve(size):
            return mask
        try:
            copy = _copy(mask, _allocate(size))
        except BaseException:
            with self._lock:
                self.nbytes -= size
            raise
        with self._lock:
            self._masks[mask.digest] = copy, size
        return copy

    def _reserve(self, size: int) -> bool:
        with self._lock:
            while self._masks and self.nbytes + size > self.budget:
                _, (_, freed) = self._masks.popitem(last=False)
                self.nbytes -= freed
                self.evictions += 1
            if not size or self.nbytes + size > self.budget:
                return False
            self.nbytes += size
            return True


def _copy(mask: Mask, memory: Bytes) -> Mask:
    """Copy a mask's tensors into `memory`."""
    offset = 0

    def copy_array(array: NDArray[Any]) -> NDArray[Any]:
        nonlocal offset
        copied = memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
        copied[...] = array
        offset += _padded(array.nbytes)
        return copied

    def copy_target(target: Target) -> Target:
        if isinstance(target, Bitmap):
            return Bitmap(copy_array(target.keep), target.columns)
        return Sparse(copy_array(target.rows), copy_array(target.cols), target.columns)

    targets = {name: copy_target(target) for name, target in mask.targets.items()}
    return Mask.known(mask.base, targets, mask.info, mask.signature, mask.leaves)


def _padded(nbytes: int) -> int:
    """Round up to a cache line."""
    return -(-nbytes // 64) * 64


def _allocate(size: int) -> Bytes:
    memory = mmap.mmap(-1, size)
    owner = _Memory(memory, size)
    address = owner.__array_interface__["data"][0]
    if torch.cuda.is_available():
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, size, 0)))
        weakref.finalize(owner, runtime.cudaHostUnregister, address)
    return np.asarray(owner)


class _Memory:
    """Keeps a mapping alive while an array over it lives."""

    def __init__(self, memory: mmap.mmap, size: int) -> None:
        view = np.frombuffer(memory, np.uint8, size)
        self.__array_interface__ = view.__array_interface__
        self._view = view
