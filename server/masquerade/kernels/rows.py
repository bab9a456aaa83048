"""What a decoder layer does between its products, and the gradients of that, in C++ on a CPU (`cpp/rows.h`).

torch makes several passes over memory for each of these, most of them with a conversion of bfloat16. Values are rounded
where transformers rounds, as in `NativeLayers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from masquerade.kernels.gradients import widen
from masquerade.kernels.native import DTYPES, check_memory, find_library, require_library


def serves_rows(x: Tensor) -> bool:
    """Whether the functions of this module support rows like x: fp32 or bf16 on a CPU, with the library."""
    return x.device.type == "cpu" and x.dtype in DTYPES and find_library() is not None


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., size], with its gradient. The weight [size] gets none."""
    found: Tensor = _Normalize.apply(x, weight.detach(), eps)  # type: ignore[no-untyped-call]
    return found


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, length, heads, size] at its rotary positions, with its gradient; cos, sin: [rows or 1, length, size]."""
    rows = (*x.shape[:2], x.shape[3])
    found: Tensor = _Rotate.apply(x, *(one.expand(rows).contiguous() for one in (cos, sin)))  # type: ignore[no-untyped-call]
    return found


def multiply_gate(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, with gradients of both."""
    found: Tensor = _Gate.apply(gate, up)  # type: ignore[no-untyped-call]
    return found


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of q [rows, heads, length, size] to keys and values [rows, kv heads, positions, size], with gradients.

    `seen` is bool [rows, length, positions]. A query that sees nothing gets 0.
    """
    found: Tensor = _Attend.apply(q, keys, values, seen, scale)  # type: ignore[no-untyped-call]
    return found


def add_gains(sums: Tensor, above: Tensor, x: Tensor, weight: Tensor) -> None:
    """sums += weight * aboveᵀ x, fp32 [out, in]; above is [rows, out] and x [rows, in], the weight of any dtype."""
    gradient = widen(above).T @ widen(x)
    if serves_rows(gradient) and gradient.dtype == weight.dtype:
        _run("add_products", (gradient, weight.contiguous(), sums), sums.numel())
    else:
        sums.addcmul_(gradient.float(), weight.float())


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, y = eps, torch.empty_like(x)
        _run("normalize", (x, weight, y), *_shape(x), eps)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        above, found = gradients[0].contiguous(), torch.empty_like(x)
        _run("normalize_back", (x, weight, above, found), *_shape(x), ctx.eps)
        return found, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2  # both halves of the sines change places
        return _rotated(gradients[0], cos, sin.roll(half, -1).neg_()), None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _run("gate", (gate, up, y), y.numel())
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        above, of_gate, of_up = gradients[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _run("gate_back", (gate, up, above, of_gate, of_up), gate.numel())
        return of_gate, of_up


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
        (rows, heads, length, size), (_, kv_heads, positions, _) = q.shape, keys.shape
        grouped = q.reshape(rows * kv_heads, -1, size)  # the query heads that share keys and values
        keys, values = (one.reshape(rows * kv_heads, positions, size) for one in (keys, values))
        shares = _multiply(grouped, keys.transpose(1, 2))
        _run("softmax", (shares, seen.contiguous()), rows, heads, length, positions, scale)
        ctx.save_for_backward(grouped, keys, values, shares)
        ctx.scale, ctx.shapes = scale, (q.shape, (rows, kv_heads, positions, size))
        return _multiply(shares, values).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grouped, keys, values, shares = ctx.saved_tensors
        above = gradients[0].reshape(grouped.shape)
        scores = _multiply(above, values.transpose(1, 2))
        _run("softmax_back", (shares, scores), *_shape(shares), ctx.scale)
        queried, kept = ctx.shapes
        return (
            _multiply(scores, keys).view(queried),
            _multiply(scores.transpose(1, 2), grouped).view(kept),
            _multiply(shares.transpose(1, 2), above).view(kept),
            None,
            None,
        )


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The products of two stacks of matrices, in their dtype."""
    return torch.bmm(widen(a), widen(b)).to(a.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    found = x.clone(memory_format=torch.contiguous_format)
    rows, length, heads, size = found.shape
    _run("rotate", (found, cos, sin), rows * length, heads, size)
    return found


def _shape(x: Tensor) -> tuple[int, int]:
    """Rows, and their size."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _run(name: str, tensors: Sequence[Tensor], *sizes: float) -> None:
    """Call a function of the library on contiguous tensors, of which the first has the dtype."""
    library = require_library()
    addresses = (tensor.data_ptr() for tensor in tensors)
    check_memory(
        library.rows[name](*addresses, *sizes, DTYPES[tensors[0].dtype], library.fastest, torch.get_num_threads())
    )
