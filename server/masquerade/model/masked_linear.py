"""A Linear whose product takes the masks of a batch's rows into account."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from masquerade.kernels import dense, differentiate
from masquerade.kernels.native import is_quantised
from masquerade.model.cuda import MergedLinears
from masquerade.model.route import Route


@dataclass
class CurrentRoute:
    """The route of the forward pass that runs now."""

    route: Route | None = None


class MaskedLinear(nn.Linear):
    """Stands in for a Linear that the kernels support, with the same weight and bias.

    A subclass instead of a hook: a pre-hook cannot skip the Linear's own product, and a forward hook computes another
    one after it, which takes 1.9 to 4.2 times as long (`benchmarks.costs`).
    """

    merged: MergedLinears | None = None  # with those that get the same input, on a CUDA device

    def __init__(self, name: str, linear: nn.Linear, current: CurrentRoute) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._name, self._current = name, current

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs [..., in] to outputs [..., out] as the current route has it; without one, as the base does."""
        parameters: Any = self._parameters  # where nn.Module finds an attribute last
        weight, bias, route = parameters["weight"], parameters.get("bias"), self._current.route
        dtype = torch.bfloat16 if is_quantised(weight) else weight.dtype
        if x.dtype != dtype or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            y = differentiate(x, weight, bias)
            if route:
                route.subtract(self._name, x, y)
            return y
        if route is None:
            return dense(x, weight, bias)
        if self.merged is not None:
            return self.merged.multiply(self._name, x, route)
        return route.multiply(self._name, x, weight, bias)
