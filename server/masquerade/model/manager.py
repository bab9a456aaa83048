"""Attaches masks to a model: a pre-hook on the model sets the batch's route, and its Linears apply it.

A `MaskedLinear` replaces every Linear that the kernels support; on a CUDA device, those of one input are merged. On
every other maskable Linear a forward hook subtracts what the rows' masks prune from the layer's own product. In a step
of the engine, decoder layers that the kernels support run natively as a whole. The values of weights never change.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskstore import Mask, MaskReader
from masquerade.kernels import correct, footprint, serves
from masquerade.kernels.cuda import serves as serves_cuda
from masquerade.model.cuda import MergedLinears, merge_linears
from masquerade.model.masked_linear import CurrentRoute, MaskedLinear
from masquerade.model.native_layers import find_forwards
from masquerade.model.route import ResidentMask
from masquerade.model.targets import check_target, find_targets


class MaskManager:
    """Makes a model mask-aware: while attached, `model(..., route=route)` applies each row's mask.

    Not thread-safe: like any model, it may run in one thread at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._linears = find_targets(model)
        self._indices = {name: index for index, name in enumerate(self._linears)}  # shared by all masks
        self._handles: list[RemovableHandle] = []
        self._replaced: dict[str, nn.Linear] = {}
        self._merged: list[MergedLinears] = []
        self._layers: list[nn.Module] = []  # those with a native forward
        self._current = CurrentRoute()

    @classmethod
    def attach(cls, model: nn.Module) -> Self:
        """Attach to a model and replace its supported Linears.

        A call without a `route` computes the base: bit-identical in fp32; with one, and in bf16, the native kernels
        of a CPU round differently from torch.
        """
        manager = cls(model)
        manager._handles = [
            model.register_forward_pre_hook(manager._set_route, with_kwargs=True),
            model.register_forward_hook(manager._clear_route, always_call=True),
        ]
        masked: dict[str, MaskedLinear] = {}
        for name, module in list(model.named_modules()):
            if serves(module):
                masked[name] = MaskedLinear(name, module, manager._current)
                model.set_submodule(name, masked[name])
                manager._replaced[name] = module
            elif name in manager._linears:
                manager._handles.append(module.register_forward_hook(manager._corrector(name)))
        for merged in merge_linears({name: masked[name] for name in masked if serves_cuda(manager._replaced[name])}):
            manager._merged.append(merged)
            for name in merged.names:
                masked[name].merged = merged
        for layer, forward in find_forwards(model, manager._indices, manager._current).items():
            layer.forward = forward
            manager._layers.append(layer)
        return manager

    def detach(self) -> None:
        """Restore the model's own Linears and remove the hooks. Calling it again has no effect."""
        while self._handles:
            self._handles.pop().remove()
        self._merged.clear()
        while self._layers:
            del self._layers.pop().forward
        while self._replaced:
            self._model.set_submodule(*self._replaced.popitem())

    def fit(self, mask: Mask, backend: str | None = None) -> ResidentMask:
        """Load a mask onto the device of each Linear.

        `backend` is a name in `kernels.BACKENDS`; by default each Linear gets its fastest (`kernels.choose`). Raises
        `MaskMismatch` if a target is not a maskable Linear of the model or has another shape.
        """
        for name, target in mask.targets.items():
            check_target(self._linears, name, target.shape)
        corrections = {name: correct(self._linears[name], target, backend) for name, target in mask.targets.items()}
        return ResidentMask(mask.digest, mask.info, corrections, self._indices)

    def measure(self, mask: MaskReader) -> int:
        """Device bytes that `fit` will need, from the file's header. Raises `MaskMismatch` as `fit` does."""
        total = 0
        for name, module in mask.header.modules.items():
            check_target(self._linears, name, (module.out, module.columns))
            total += footprint(self._linears[name], module.kind, module.pruned or 0)
        return total

    def _set_route(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._current.route = kwargs.pop("route", None)
        return args, kwargs

    def _clear_route(self, *_: Any) -> None:
        self._current.route = None
        for merged in self._merged:
            merged.forget()

    def _corrector(self, name: str) -> Any:
        def subtract(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            route = self._current.route
            if route is None or not route.masks(name):
                return None
            y = output.contiguous()
            route.subtract(name, args[0], y)
            return y

        return subtract
