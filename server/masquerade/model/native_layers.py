"""Decoder layers that the native kernels compute in one call in a step of the engine.

A layer is one of `STRUCTURES` or keeps transformers' forward, as all layers do in every other call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from masquerade.kernels import LayerParts, NativeLayers, PagedStep
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


class NotNative(Exception):
    """Transformers would have to compute a layer of a `NativePlan`."""


@dataclass(frozen=True)
class NativePlan:
    """A `StepPlan` of which only the native layers know: a layer that they do not compute raises `NotNative`."""

    paged: PagedStep


class LayerRun:
    """Consecutive layers, which one call computes.

    A hook or a module in training among them leaves all to transformers: only the layers' own forwards call submodules.
    """

    def __init__(self, layers: Sequence[nn.Module], parts: Sequence[LayerParts], current: CurrentRoute) -> None:
        first: Any = layers[0]
        self.parts, self._layers, self._current = parts, layers, current
        self._native = NativeLayers(first.self_attn.layer_idx, parts)
        modules = [module for layer in layers for module in layer.modules()]
        self._hooks = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self._computed: ReferenceType[PagedStep] | None = None  # the last step, whose cache must not live for it

    def has_computed(self, step: PagedStep) -> bool:
        """Whether the rows that the layers of this step are called with are the run's output."""
        return self._computed is not None and self._computed() is step

    def compute(self, hidden: Tensor, step: PagedStep, rotation: tuple[Tensor, Tensor]) -> Tensor | None:
        """The output of the last layer for the inputs of the first, [1, rows, hidden]; None if it has to be computed by
        transformers, layer by layer.
        """
        self._computed, route = None, self._current.route
        training = any(layer.training for layer in self._layers)
        if route is None or not route.is_native or training or torch.is_grad_enabled() or any(self._hooks):
            return None
        output = self._native(hidden, step, route.product, rotation)
        self._computed = None if output is None else ref(step)
        return output


class NativeForward:
    """Stands in for the forward of a layer: the first of a run computes all of them, the others return what they get.

    It is assigned, because a hook cannot skip a module's own forward, and another module in the layer's place would
    lack what models and builds read of it.
    """

    def __init__(self, layer: nn.Module, parts: LayerParts, run: LayerRun, *, is_first: bool) -> None:
        self.parts, self.run = parts, run
        self._layer, self._is_first = layer, is_first

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the layer's forward."""
        plan: StepPlan | None = kwargs.get("plan")
        if plan is not None and (step := plan.paged) is not None:
            if not self._is_first:
                output = hidden if self.run.has_computed(step) else None
            else:
                output = self.run.compute(hidden, step, kwargs["position_embeddings"])
            if output is not None:
                return output
            if isinstance(plan, NativePlan):
                raise NotNative
        return type(self._layer).forward(self._layer, hidden, *args, **kwargs)


@dataclass(frozen=True)
class NativeStack:
    """All decoder layers of a model, which one call can compute."""

    layers: int
    kv_heads: int
    head_size: int


def find_stack(model: nn.Module) -> NativeStack | None:
    """The decoder layers of a model with its masks attached; None if transformers computes any of them."""
    config: Any = model.config
    forwards = [module.forward for module in model.modules() if isinstance(module.forward, NativeForward)]
    runs = {forward.run for forward in forwards}
    if len(runs) != 1 or len(forwards) != config.num_hidden_layers:
        return None
    (run,) = runs
    shapes = {(part.linears[1].out_features // part.head_size, part.head_size) for part in run.parts}
    return NativeStack(len(forwards), *shapes.pop()) if len(shapes) == 1 else None


def find_parts(layer: nn.Module) -> LayerParts | None:
    """The parts of a decoder layer with its masks attached; None if its structure is not known."""
    return layer.forward.parts if isinstance(layer.forward, NativeForward) else None


def find_forwards(
    model: nn.Module, indices: Mapping[str, int], current: CurrentRoute
) -> dict[nn.Module, NativeForward]:
    """The native forwards of a model's decoder layers whose Linears are masked; `indices` as in `ResidentMask`."""
    found = {layer.self_attn.layer_idx: (layer, parts) for layer, parts in _find_layers(model, indices)}
    forwards: dict[nn.Module, NativeForward] = {}
    for _, numbered in groupby(enumerate(sorted(found)), lambda pair: pair[1] - pair[0]):  # without a gap
        layers, parts = zip(*(found[number] for _, number in numbered), strict=True)
        run = LayerRun(layers, parts, current)
        for layer, of_layer in zip(layers, parts, strict=True):
            forwards[layer] = NativeForward(layer, of_layer, run, is_first=layer is layers[0])
    return forwards


def _find_layers(model: nn.Module, indices: Mapping[str, int]) -> Iterator[tuple[Any, LayerParts]]:
    for name, module in model.named_modules():
        structure = STRUCTURES.get(f"{type(module).__module__}.{type(module).__qualname__}")  # no subclass
        if structure and (parts := _find_parts(name, module, structure, indices)):
            yield module, parts


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
        rotates=getattr(attention, "use_rope", True),
        norms_rotated=structure.norms_rotated,
        head_size=attention.head_dim,
        eps=epsilons.pop(),
        scale=attention.scaling,
        residual=getattr(layer, "residual_multiplier", 1.0),
    )
