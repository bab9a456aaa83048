"""Linears that get the same input, merged: their weights lie one after another, and one launch multiplies them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from masquerade.model.route import Route

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names under one parent, called in this order


class MergedLinears:
    """Up to three Linears of one input. Each stays a module with its own weight, which is a part of the merged one."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        """Move weights and biases side by side, unless they are; that needs room for both at that moment."""
        modules = list(linears.values())
        self.names = tuple(linears)
        self.outs = tuple(module.out_features for module in modules)
        self.weight = _merge([module.weight for module in modules])  # [sum of outs, in]
        biases: list[Any] = [module.bias for module in modules]
        self.bias = None if biases[0] is None else _merge(biases)
        self._input: Tensor | None = None
        self._outputs: dict[str, Tensor] = {}

    def multiply(self, name: str, x: Tensor, route: Route) -> Tensor:
        """The masked outputs [..., out] of one of the Linears for inputs x [..., in].

        The first that is called with an input computes the outputs of all, which wait for the others' calls.
        """
        if x is not self._input or name not in self._outputs:
            outputs = route.multiply_merged(self.names, self.outs, x, self.weight, self.bias)
            parts = torch.split(outputs, list(self.outs), -1)
            self._input, self._outputs = x, dict(zip(self.names, parts, strict=True))
        y = self._outputs.pop(name)
        if not self._outputs:
            self._input = None
        return y

    def forget(self) -> None:
        """Drop outputs that wait for calls which do not come, because the forward pass has failed."""
        self._input, self._outputs = None, {}


def merge_linears(linears: Mapping[str, nn.Linear]) -> Iterator[MergedLinears]:
    """Merge a model's Linears on CUDA devices, by name, where all of a group are among them and are alike."""
    for name in linears:
        names = find_group(name)
        modules = [linears[one] for one in names if one in linears]
        if name == names[0] and len(names) == len(modules) > 1 and _are_alike(modules):
            yield MergedLinears(dict(zip(names, modules, strict=True)))


@lru_cache(maxsize=1 << 14)
def find_group(name: str) -> tuple[str, ...]:
    """The names of a Linear and of those that get its input, in order; its own alone if there are none."""
    parent, _, last = name.rpartition(".")
    group = next((group for group in GROUPS if last in group), None)
    return tuple(f"{parent}.{one}" for one in group) if group else (name,)


def _are_alike(linears: Sequence[nn.Linear]) -> bool:
    def describe(linear: nn.Linear) -> tuple[Any, ...]:
        weight = linear.weight
        return weight.device, weight.dtype, weight.requires_grad, linear.in_features, linear.bias is None

    return len(set(map(describe, linears))) == 1


def _are_merged(parts: Sequence[Tensor]) -> bool:
    one_memory = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return one_memory and all(before.data_ptr() + before.nbytes == part.data_ptr() for before, part in pairwise(parts))


def _merge(parts: Sequence[Tensor]) -> Tensor:
    if _are_merged(parts):
        first = parts[0].detach()
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    with torch.inference_mode(False):  # the parts stay parameters that gradients may need
        merged = torch.cat([part.detach() for part in parts])
        for part, own in zip(parts, torch.split(merged, [len(part) for part in parts]), strict=True):
            part.data = own
    if merged.is_cuda:
        torch.cuda.empty_cache()  # of the parts as they were, whose sizes are not those of the next ones
    return merged
