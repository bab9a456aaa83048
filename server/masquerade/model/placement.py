"""Divides the decoder layers of a model among devices, and moves the hidden states from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from masquerade.errors import UnusableModel
from masquerade.model.quantized import QUANTIZATIONS, measure_weight
from masquerade.model.targets import find_layers, find_targets, layer_number


@dataclass(frozen=True)
class Stage:
    """Consecutive decoder layers on one device."""

    device: torch.device
    layers: range


@dataclass(frozen=True)
class Placement:
    """The device of each decoder layer. All else, such as embeddings and the LM head, is on the first device."""

    first: torch.device
    layers: Sequence[torch.device]

    def find(self, target: str) -> torch.device:
        """The device of a maskable Linear."""
        return self.layers[layer_number(target)]

    def apply(self, model: nn.Module) -> None:
        """Move a model there.

        Hooks bring a layer's inputs to its device, and the last layer's output to the first device, so the model is
        called as before. Masks are loaded to the devices of their Linears (`MaskManager.fit`).
        """
        layers = find_layers(model)
        if {*self.layers} == {self.first}:
            model.to(self.first)
            return
        within = {part for layer in layers for part in layer.modules()}
        for module in model.modules():
            if not within.intersection(module.modules()):
                module.to(self.first)
        for layer, device in zip(layers, self.layers, strict=True):
            layer.to(device)
        for stage in find_stages(model):
            mover = _Mover(stage.device)
            for number in stage.layers if stage.device != self.first else ():
                bring = mover.begin if number == stage.layers.start else mover.move
                layers[number].register_forward_pre_hook(bring, with_kwargs=True)
        layers[-1].register_forward_hook(lambda _, __, output: _return_to(self.first, output))


class _Mover:
    """Brings the inputs of a stage's layers to its device; those that all layers have in common are copied once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of what was copied, which lives as long

    def begin(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs of the stage's first layer."""
        self._copies.clear()
        return self.move(_, args, kwargs)

    def move(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs of a layer."""
        return tree_map(self._bring, args), tree_map(self._bring, kwargs)

    def _bring(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device == self._device:
            return value
        if id(value) not in self._copies:
            self._copies[id(value)] = value, value.to(self._device)
        return self._copies[id(value)][1]


def _return_to(device: torch.device, output: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, output)


def place(model: nn.Module, devices: Sequence[torch.device], quantization: str | None = None) -> Placement:
    """Divide the layers, in their order, so that the device with the most weights has as few as possible.

    Weights count as they are once they are quantised. Raises `UnusableModel` if there are fewer layers than devices,
    and `ValueError` if a Linear cannot be quantised so.
    """
    layers = find_layers(model)
    if len(layers) < len(devices):
        raise UnusableModel(
            f"`--split-layers {len(devices)}` divides the decoder layers, of which the model has {len(layers)}"
        )
    if len(devices) == 1:
        return Placement(devices[0], [devices[0]] * len(layers))
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in layers]
    rest = sum(weight.nbytes for weight in model.parameters()) - sum(sizes)
    for name, linear in find_targets(model).items() if quantization in QUANTIZATIONS else ():
        sizes[layer_number(name)] += measure_weight(linear, str(quantization)) - linear.weight.nbytes
    return Placement(devices[0], [devices[part] for part in divide(sizes, rest, len(devices))])


def divide(sizes: Sequence[int], rest: int, parts: int) -> list[int]:
    """The part of each of these consecutive sizes, such that the largest sum of a part is as small as possible.

    `rest` counts for the first part, which may have nothing else.
    """
    low, high = max(rest, *sizes), rest + sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if _fill(sizes, rest, middle)[-1] < parts:
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, rest, low)


def _fill(sizes: Sequence[int], rest: int, most: int) -> list[int]:
    """The part of each size, if no part may have more than `most`."""
    part, used, found = 0, rest, []
    for size in sizes:
        if used + size > most:
            part, used = part + 1, 0
        used += size
        found.append(part)
    return found


def find_stages(model: nn.Module) -> list[Stage]:
    """The layers of a model by device, in their order."""
    devices = [next(layer.parameters()).device for layer in find_layers(model)]
    stages, start = [], 0
    for device, same in groupby(devices):
        stop = start + len(list(same))
        stages.append(Stage(device, range(start, stop)))
        start = stop
    return stages
