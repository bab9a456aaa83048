"""Products that gradients pass through, by torch, and the gradients of weights.

Without instructions for bfloat16 a processor takes many times as long for them as in float32 (`benchmarks.kernels`).
There the operands are converted, and what comes out is rounded once.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from masquerade.kernels.native import has_bf16, is_quantised


def differentiate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with gradients of x [..., in], and of the weight if it requires any.

    A graph has no second copy of a weight, dequantised or converted.
    """
    if not is_quantised(weight) and (weight.requires_grad or widen(x) is x):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def multiply_transposed(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of [n, out] and [n, in], such as the gradient of a weight: fp32 [out, in]."""
    return (widen(left).T @ widen(right)).float()


def multiply_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x of x Wᵀ from that of the product, in its dtype."""
    return (widen(gradient) @ widen(weight)).to(gradient.dtype)


def widen(values: Tensor) -> Tensor:
    """The values as torch multiplies them fastest: bfloat16 on a CPU without such instructions as float32."""
    slow = values.dtype is torch.bfloat16 and values.device.type == "cpu" and _is_slow()
    return values.float() if slow else values


@cache
def _is_slow() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and not has_bf16()


class _Product(torch.autograd.Function):
    """A product whose gradient reads the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = F.linear(widen(x), widen(_read(weight)), None if bias is None else widen(bias))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return multiply_back(gradients[0], _read(ctx.weight)), None, None


def _read(weight: Any) -> Tensor:
    """The values of a plain or a quantised weight."""
    values: Tensor = weight.read() if is_quantised(weight) else weight.detach()
    return values
