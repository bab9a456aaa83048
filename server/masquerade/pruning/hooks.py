"""Contexts that observe Linears or replace what modules compute, and products that are needed for gradients only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from masquerade.kernels import dense_weight, multiply_back


@contextmanager
def observed(linears: Mapping[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the context, `see(name, input, output)` is called after every forward of a Linear."""

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(name, args[0], output)

        return hook

    handles = [linear.register_forward_hook(make_hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(modules: Sequence[nn.Module], functions: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Within the context, each module's forward is a function.

    `forward` is assigned because torch has no hook for this: a forward pre-hook cannot skip the forward, and another
    module in its place would lack the attributes that models read of their layers and the hooks of `observed`.
    """
    before: list[Any] = [vars(module).get("forward") for module in modules]  # one that was assigned already
    for module, function in zip(modules, functions, strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module, assigned in zip(modules, before, strict=True):
            if assigned is None:
                del module.forward
            else:
                module.forward = assigned


def without_products(linears: Sequence[nn.Linear]) -> AbstractContextManager[None]:
    """Within the context, the Linears' outputs are zero, with the gradients of x Wᵀ."""
    return replaced(linears, [partial(_zero_product, linear) for linear in linears])


def find_added(output: Tensor, made: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that `output` depends on by additions alone, so that their gradients equal its own.

    This is read from the autograd graph, whatever the values are. A tensor of the output's shape is not broadcast.
    """
    assert output.grad_fn is not None
    users: dict[Any, list[Any]] = {output.grad_fn: []}  # node -> the nodes that use it, once for each use
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is not None and source not in users:
                users[source] = []
                todo.append(source)
            if source is not None:
                users[source].append(node)

    def is_only_added(node: Any) -> bool:
        while node is not output.grad_fn:
            if len(users.get(node, ())) != 1:
                return False
            (node,) = users[node]
            if node.name() != "AddBackward0" or node._saved_alpha != 1:
                return False
        return True

    return [name for name, tensor in made.items() if tensor.shape == output.shape and is_only_added(tensor.grad_fn)]


class _ZeroProduct(torch.autograd.Function):
    """A zero with the shape and the gradient of x Wᵀ, without its cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return multiply_back(gradients[0], weight), None


def _zero_product(linear: nn.Linear, x: Tensor) -> Tensor:
    output: Tensor = _ZeroProduct.apply(x, dense_weight(linear).to(x.dtype))  # type: ignore[no-untyped-call]
    return output
