"""Decoder layers that the native kernels compute in one call in a step of the engine.

A layer is one of `STRUCTURES` or keeps transformers' forward, as all layers do in every other call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from masquerade.kernels import LayerParts, NativeLayer, PagedStep
from masquerade.model.masked_linear import CurrentRoute, MaskedLinear

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Structure:
    """How a family's decoder layer differs from Llama's."""

    head_norms: tuple[str, ...] = ()  # of queries and keys, in `self_attn`
    norms_rotated: bool = False  # whether heads are normalised after they are rotated


def _name_class(model_type: str, prefix: str) -> str:
    return f"transformers.models.{model_type}.modeling_{model_type}.{prefix}DecoderLayer"


STRUCTURES: Mapping[str, Structure] = {  # by class
    _name_class("llama", "Llama"): Structure(),
    _name_class("mistral", "Mistral"): Structure(),
    _name_class("qwen2", "Qwen2"): Structure(),
    _name_class("qwen3", "Qwen3"): Structure(("q_norm", "k_norm")),
    _name_class("smollm3", "SmolLM3"): Structure(),
    _name_class("seed_oss", "SeedOss"): Structure(),
    _name_class("granite", "Granite"): Structure(),
    _name_class("hunyuan_v1_dense", "HunYuanDenseV1"): Structure(("query_layernorm", "key_layernorm"), True),
}


class StepPlan(Protocol):
    """What the engine passes to every layer of a step."""

    @property
    def paged(self) -> PagedStep | None:
        """Where the native kernels find keys and values; None if they do not attend."""


class NativeForward:
    """Stands in for the forward of a decoder layer.

    It is assigned, because a hook cannot skip the layer's own forward, and another module in the layer's place would
    lack what models and builds read of it.
    """

    def __init__(self, layer: nn.Module, native: NativeLayer, current: CurrentRoute) -> None:
        attention: Any = layer.self_attn
        self._layer, self._native, self._current = layer, native, current
        self._number: int = attention.layer_idx
        self._rotates: bool = getattr(attention, "use_rope", True)
        inner = [module for module in layer.modules() if module is not layer]
        self._hooks = [hooks for module in inner for hooks in (module._forward_pre_hooks, module._forward_hooks)]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output for rows [1, rows, hidden], and whatever its forward returns."""
        plan: StepPlan | None = kwargs.get("plan")
        if plan is not None and plan.paged is not None and (output := self._run(hidden, plan.paged, kwargs)) is not None:
            return output
        return type(self._layer).forward(self._layer, hidden, *args, **kwargs)

    def _run(self, hidden: Tensor, step: PagedStep, kwargs: Mapping[str, Any]) -> Tensor | None:
        route = self._current.route
        if route is None or not route.is_native or self._layer.training or torch.is_grad_enabled() or any(self._hooks):
            return None
        rotation = kwargs["position_embeddings"] if self._rotates else None
        return self._native(hidden, step, self._number, route.product, rotation)


def find_forwards(model: nn.Module, indices: Mapping[str, int], current: CurrentRoute) -> dict[nn.Module, NativeForward]:
    """The native forwards of a model's decoder layers whose Linears are masked; `indices` as in `ResidentMask`."""
    found: dict[nn.Module, NativeForward] = {}
    for name, module in model.named_modules():
        structure = STRUCTURES.get(f"{type(module).__module__}.{type(module).__qualname__}")  # no subclass
        if structure and (parts := _find_parts(name, module, structure, indices)):
            found[module] = NativeForward(module, NativeLayer(parts), current)
    return found


def _find_parts(name: str, layer: Any, structure: Structure, indices: Mapping[str, int]) -> LayerParts | None:
    """A layer's parts; None if one of them is not what the structure has."""
    attention: Any = layer.self_attn
    linears = {f"{name}.{linear}": layer.get_submodule(linear) for linear in LINEARS}
    norms = [getattr(layer, norm) for norm in NORMS]
    heads = [getattr(attention, norm) for norm in structure.head_norms]
    epsilons = {norm.variance_epsilon for norm in norms + heads}
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    if (
        len({type(module).__module__ for module in (layer, attention, layer.mlp, *norms, *heads)}) > 1
        or any(type(linear) is not MaskedLinear for linear in linears.values())
        or not linears.keys() <= indices.keys()
        or type(layer.mlp.act_fn) not in (SiLUActivation, nn.SiLU)
        or len(epsilons) > 1
        or (window is not None and window < attention.config.max_position_embeddings)
    ):
        return None
    return LayerParts(
        linears=[*linears.values()],
        indices=[indices[linear] for linear in linears],
        norms=[*norms, *(heads or (None, None))],
        norms_rotated=structure.norms_rotated,
        head_size=attention.head_dim,
        eps=epsilons.pop(),
        scale=attention.scaling,
        residual=getattr(layer, "residual_multiplier", 1.0),
    )
