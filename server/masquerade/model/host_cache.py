"""Masks in host memory, from where a device takes them without the disk.

Knows bytes and recency, and how memory is locked for a device. Refuses to know files and personas.
"""

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
    """Least-recently-used copies of masks within a byte budget. Safe for several threads.

    Each mask has a mapping of its own, page-locked where there is a CUDA device: nothing to fragment, at most a page
    lost a mask. Where the device is the host, a budget of 0 is right: the system's cache of files does this.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget  # bytes
        self.nbytes = 0  # bytes kept, and those of copies being made
        self.evictions = 0
        self._masks: OrderedDict[str, tuple[Mask, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        return digest in self._masks

    def find(self, digest: str) -> Mask | None:
        """A copy, if there is one."""
        with self._lock:
            if digest not in self._masks:
                return None
            self._masks.move_to_end(digest)
            return self._masks[digest][0]

    def keep(self, mask: Mask) -> Mask:
        """Copy a mask in and return the copy; or the mask itself if there is no room for it."""
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
    """The same mask with all its tensors in one piece of memory."""
    place = 0

    def move(array: NDArray[Any]) -> NDArray[Any]:
        nonlocal place
        moved = memory[place : place + array.nbytes].view(array.dtype).reshape(array.shape)
        moved[...] = array
        place += _padded(array.nbytes)
        return moved

    def carry(target: Target) -> Target:
        if isinstance(target, Bitmap):
            return Bitmap(move(target.keep), target.columns)
        return Sparse(move(target.rows), move(target.cols), target.columns)

    targets = {name: carry(target) for name, target in mask.targets.items()}
    return Mask.known(mask.base, targets, mask.info, mask.signature, mask.leaves)


def _padded(nbytes: int) -> int:
    """Tensors begin on cache lines."""
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
    """Owns a mapping for as long as an array over it lives."""

    def __init__(self, memory: mmap.mmap, size: int) -> None:
        view = np.frombuffer(memory, np.uint8, size)
        self.__array_interface__ = view.__array_interface__
        self._view = view
