"""The numbers that a Linear multiplies by, and memory that is shared instead of copied.

Knows how bitsandbytes stores a quantised weight. Refuses to know masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] of a Linear: its own, or what its quantised one stands for, made anew by each call.

    Int8 codes count in 127ths of their row's largest weight and become fp32; NF4 has its quantisation state's dtype.
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
    """A CPU tensor over an array's memory, which it keeps alive. Read-only arrays stay so by agreement: never write."""
    return torch.from_numpy(np.asarray(_Writable(array)))


class _Writable:
    """Shows an array as if it could be written, because torch warns of every other one."""

    def __init__(self, array: NDArray[Any]) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._array = array  # kept alive
