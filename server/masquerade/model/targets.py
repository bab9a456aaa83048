"""The layers of a decoder and its maskable Linears: those of attention, dense MLPs and shared experts, no others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from maskstore import MaskMismatch

MASKABLE = "masks apply to the Linears of attention, dense MLPs and shared experts"
_PARTS = r"self_attn|mlp|feed_forward|shared_mlp"  # Llama 4 and Granite have names of their own
_ROUTER = r"(?:\w+_)?(?:gate|router)$"  # chooses experts, or weighs the shared one
_TARGET = re.compile(rf"\.layers\.\d+\.(?:{_PARTS})\.(?:shared_experts?\.)?(?!{_ROUTER})\w+$")
_LAYER = re.compile(r"(^|\.)layers\.\d+$")
_OUTPUTS = (".o_proj", ".down_proj", ".output_linear", ".dense", ".fc2", ".c_proj")

SCOPES: Mapping[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "attention": lambda name: ".self_attn." in name,
    "mlp": lambda name: ".self_attn." not in name,
    "outputs": lambda name: name.endswith(_OUTPUTS),
}


def find_targets(model: nn.Module, scope: str = "all") -> dict[str, nn.Linear]:
    """The maskable Linears of a model in a scope of `SCOPES`, by module name, in the model's order."""
    within = SCOPES[scope]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _TARGET.search(name) and within(name)
    }


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return [module for name, module in model.named_modules() if _LAYER.search(name)]


def layer_number(name: str) -> int:
    """The layer of a target: 3 for `model.layers.3.mlp.up_proj`."""
    return int(name.split(".layers.")[1].split(".")[0])


def check_target(linears: Mapping[str, nn.Linear], name: str, shape: tuple[int, int]) -> None:
    """Raise `MaskMismatch` if a mask's target is none of a model's Linears, or has another shape (out, in)."""
    linear = linears.get(name)
    if linear is None:
        raise MaskMismatch(f"the mask's target {name!r} {_explain_refusal(name)}")
    if shape != (found := (linear.out_features, linear.in_features)):
        raise MaskMismatch(f"{name!r} has the shape {found} here, but {shape} in the mask")


def _explain_refusal(name: str) -> str:
    """Why a module that is not in `find_targets` cannot be masked, in words that continue its name."""
    parts = name.split(".")
    if "experts" in parts:
        return f"belongs to experts, which no mask can prune; {MASKABLE}"
    if any(re.match(_ROUTER, part) for part in parts[1:]):
        return f"is a router, which no mask can prune; {MASKABLE}"
    return "is not a maskable Linear of this model"
