"""Device tensors with fixed addresses, filled from double-buffered host memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGN = 16  # bytes; kernels read aligned tensors in larger pieces

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Staging:
    """Named tensors in one device buffer, initially zero, filled from arrays in one asynchronous copy.

    The copy runs on the current stream, from one of two host buffers (pinned on a CUDA device) in turn.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        size, slices = 0, {}
        for name, (dtype, shape) in layout.items():
            slices[name] = slice(size, size + int(np.prod(shape)) * dtype.itemsize)
            size = -(-slices[name].stop // _ALIGN) * _ALIGN
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        pinned = self._device.is_cuda
        buffers = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._buffers = cycle([(buffer, torch.cuda.Event() if pinned else None) for buffer in buffers])  # type: ignore[no-untyped-call]

        def view(buffer: Tensor) -> dict[str, Tensor]:
            return {name: buffer[slices[name]].view(dtype).view(shape) for name, (dtype, shape) in layout.items()}

        self.tensors = view(self._device)
        self._arrays = {each.data_ptr(): {name: part.numpy() for name, part in view(each).items()} for each in buffers}

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy arrays into the tensors of the same names and shapes. Every tensor needs one."""
        buffer, copied = next(self._buffers)
        if copied is not None:
            copied.synchronize()  # the copy before the last; done unless the device is far behind
        for name, array in self._arrays[buffer.data_ptr()].items():
            array[...] = arrays[name]
        self._device.copy_(buffer, non_blocking=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(self._device.device))
