"""Makes a model mask-aware, and gives it back unchanged.

Knows the hooks: one forward pre-hook on the model puts a batch's route in place; a Linear that the native kernels serve
computes as the route has it, and a forward hook on every other maskable one subtracts what the rows' masks prune.
Refuses to know where masks come from and who asked for them. Weights are never altered, so `detach` has nothing to undo
but the hooks.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskstore import Mask, MaskMismatch, MaskReader
from masquerade.kernels import correct, dense, footprint, serves
from masquerade.model.route import ResidentMask, Route
from masquerade.model.targets import find_targets


class MaskManager:
    """The masks' hold on a model. While attached, `model(..., route=route)` serves every row as its mask says.

    Not thread-safe: one thread at a time may call the model, as is true of the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._linears = find_targets(model)
        self._numbers = {name: number for number, name in enumerate(self._linears)}  # shared by all masks
        self._handles: list[RemovableHandle] = []
        self._served: list[nn.Linear] = []
        self._route: Route | None = None

    @classmethod
    def attach(cls, model: nn.Module) -> Self:
        """Hook into a model. A call without a `route` is the base's, to the bit in fp32; in bf16 on a CPU the native
        kernels take over from torch, whose sums are rounded otherwise.
        """
        manager = cls(model)
        manager._handles = [
            model.register_forward_pre_hook(manager._put_route, with_kwargs=True),
            model.register_forward_hook(manager._drop_route, always_call=True),
        ]
        for name, module in model.named_modules():
            if serves(module):
                # Bound, so that a copy of the model computes with its own weights.
                module.forward = MethodType(manager._multiplier(name), module)  # type: ignore[method-assign]
                manager._served.append(module)
            elif name in manager._linears:
                manager._handles.append(module.register_forward_hook(manager._corrector(name)))
        return manager

    def detach(self) -> None:
        """Remove every hook. Weights were never touched, so the model is what it was. May be called twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._served:
            del self._served.pop().forward

    def fit(self, mask: Mask, backend: str | None = None) -> ResidentMask:
        """Prepare a mask for this model, on the device of each Linear.

        Raises `MaskMismatch` if a target is not a maskable Linear of the model or has another shape. `backend` is a
        name of `kernels.BACKENDS`; by default the fastest serves each Linear (`kernels.choose`).
        """
        for name, target in mask.targets.items():
            self._check(name, target.shape)
        worn = {name: correct(self._linears[name], target, backend) for name, target in mask.targets.items()}
        return ResidentMask(mask.digest, mask.info, worn, self._numbers)

    def measure(self, mask: MaskReader) -> int:
        """Device bytes of what `fit` would make, from what the file's header says; raises `MaskMismatch` as it does."""
        total = 0
        for name, module in mask.header.modules.items():
            self._check(name, (module.out, module.columns))
            pruned = module.tensors["cols"].shape[0] if "cols" in module.tensors else 0
            total += footprint(self._linears[name], module.kind, pruned)
        return total

    def _check(self, name: str, shape: tuple[int, int]) -> None:
        linear = self._linears.get(name)
        if linear is None:
            raise MaskMismatch(f"the mask's target {name!r} is not a maskable Linear of this model")
        if shape != (found := (linear.out_features, linear.in_features)):
            raise MaskMismatch(f"{name!r} is {found} here, but {shape} in the mask")

    def _put_route(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._route = kwargs.pop("route", None)
        return args, kwargs

    def _drop_route(self, *_: Any) -> None:
        self._route = None

    def _corrector(self, name: str) -> Any:
        def subtract(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._route is None or not self._route.masks(name):
                return None
            y = output.contiguous()
            self._route.subtract(name, args[0], y)
            return y

        return subtract

    def _multiplier(self, name: str) -> Any:
        def forward(linear: nn.Linear, x: Tensor) -> Tensor:
            weight, bias, route = linear.weight, linear.bias, self._route
            if x.dtype != weight.dtype or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
                y = F.linear(x, weight, bias)
                if route:
                    route.subtract(name, x, y)
                return y
            if route is None:
                return dense(x, weight, bias)
            return route.multiply(name, x, weight, bias)

        return forward
