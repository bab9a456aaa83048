"""Tensors that stay where they are while what is in them changes.

Knows one buffer on the device and two on the host that take turns, so that the next contents can be prepared while the
last ones are still being copied. Refuses to know what the tensors mean.
"""

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
    """Named tensors of one layout, filled from arrays in one copy that nobody waits for.

    All of them are zero at first. The copy is on the current stream; on a CUDA device the host's side is pinned.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        size, places = 0, {}
        for name, (dtype, shape) in layout.items():
            places[name] = slice(size, size + int(np.prod(shape)) * dtype.itemsize)
            size = -(-places[name].stop // _ALIGN) * _ALIGN
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        sides = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._turns = cycle([(side, torch.cuda.Event() if pinned else None) for side in sides])  # type: ignore[no-untyped-call]

        def view(buffer: Tensor) -> dict[str, Tensor]:
            return {name: buffer[places[name]].view(dtype).view(shape) for name, (dtype, shape) in layout.items()}

        self.tensors = view(self._device)
        self._hosts = {side.data_ptr(): {name: part.numpy() for name, part in view(side).items()} for side in sides}

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy arrays into the tensors of their names, each of the tensor's shape. All tensors need one."""
        side, copied = next(self._turns)
        if copied is not None:
            copied.synchronize()  # the copy before the last one; it is done unless the device is far behind
        host = self._hosts[side.data_ptr()]
        for name, part in host.items():
            part[...] = arrays[name]
        self._device.copy_(side, non_blocking=True)
        if copied is not None:
            copied.record()
