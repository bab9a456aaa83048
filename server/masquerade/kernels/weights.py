"""The dense weight of a plain, quantised or bitsandbytes Linear, and tensors that share an array's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from masquerade.kernels.native import is_quantised

TILE = 2**20  # weights that are dequantised at a time


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] of a Linear; a quantised weight is dequantised in each call.

    A `QuantisedWeight` becomes bfloat16. An int8 code is a multiple of 1/127 of its row's largest weight and becomes
    fp32. 4-bit weights get their quantisation state's dtype.
    """
    if linear.weight.is_floating_point():
        return linear.weight.detach()
    return _dequantize(linear, 0, linear.out_features)


def dense_tiles(linear: nn.Linear) -> Iterator[tuple[int, Tensor]]:
    """The rows of `dense_weight` in order, some at a time, each part with the index of its first row.

    Of a quantised weight, no more than about `TILE` weights are dequantised at once.
    """
    if linear.weight.is_floating_point():
        yield 0, linear.weight.detach()
        return
    step = _align(linear, max(1, TILE // linear.in_features))
    for begin in range(0, linear.out_features, step):
        yield begin, _dequantize(linear, begin, min(begin + step, linear.out_features))


def _align(linear: nn.Linear, rows: int) -> int:
    """A number of rows near `rows` that are whole blocks and bytes of a 4-bit weight."""
    if (state := getattr(linear.weight, "quant_state", None)) is None:
        return rows
    whole: int = state.blocksize // math.gcd(state.blocksize, linear.in_features)
    return max(whole, rows // whole * whole)


def _dequantize(linear: nn.Linear, begin: int, end: int) -> Tensor:
    """Rows `begin` to `end` of a quantised weight; `begin` is a multiple of what `_align` returns."""
    weight: Any = linear.weight
    if is_quantised(weight):
        return weight.read(torch.arange(begin, end))  # type: ignore[no-any-return]
    if (state := getattr(weight, "quant_state", None)) is None:
        holder: Any = weight if weight.CB is not None else linear.state  # the first product moves codes and scales
        return holder.CB[begin:end].float() * (holder.SCB[begin:end].float() / 127).unsqueeze(1)  # type: ignore[no-any-return]
    from bitsandbytes import functional

    codes, scales = weight.data.view(-1).view(torch.uint8), state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    first, last = begin * linear.in_features, end * linear.in_features
    part = functional.QuantState(
        absmax=scales.float()[first // state.blocksize : -(-last // state.blocksize)],
        shape=torch.Size((end - begin, linear.in_features)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    dense: Tensor = functional.dequantize_4bit(codes[first // 2 : -(-last // 2)].view(-1, 1), part)
    return dense


def share(array: NDArray[Any]) -> Tensor:
    """A CPU tensor over an array's memory, which it keeps alive. Never write to it: the array may be read-only."""
    return torch.from_numpy(np.asarray(_Writable(array)))


class _Writable:
    """Presents an array as writable, because torch warns about read-only arrays."""

    def __init__(self, array: NDArray[Any]) -> None:
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}
        self._array = array  # kept alive
