"""The dense weight of a plain or bitsandbytes Linear, and tensors that share an array's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] of a Linear; a quantised weight is dequantised in each call.

    An int8 code is a multiple of 1/127 of its row's largest weight and becomes fp32. NF4 gets its quantisation state's
    dtype.
    """
    weight: Any = linear.weight
    if weight.is_floating_point():
        return linear.weight.detach()
    from bitsandbytes import functional

    if (state := getattr(weight, "quant_state", None)) is not None:
        dense: Tensor = functional.dequantize_4bit(weight.data, state)
        return dense
    holder: Any = weight if weight.CB is not None else linear.state  # the first forward pass moves codes and scales
    return holder.CB.float() * (holder.SCB.float() / 127).unsqueeze(1)  # type: ignore[no-any-return]


def share(array: NDArray[Any]) -> Tensor:
    """A CPU tensor over an array's memory, which it keeps alive. Never write to it: the array may be read-only."""
    return torch.from_numpy(np.asarray(_Writable(array)))


class _Writable:
    """Presents an array as writable, because torch warns about read-only arrays."""

    def __init__(self, array: NDArray[Any]) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._array = array  # kept alive
