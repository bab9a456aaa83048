"""The maskable Linears of a Llama-family decoder: those of attention and MLP, not embeddings and LM head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

_TARGET = re.compile(r"\.layers\.\d+\.(self_attn|mlp)\.\w+$")

SCOPES: Mapping[str, Callable[[str], bool]] = {
    "all": lambda _: True,
    "attention": lambda name: ".self_attn." in name,
    "mlp": lambda name: ".mlp." in name,
    "outputs": lambda name: name.endswith((".o_proj", ".down_proj")),
}


def find_targets(model: nn.Module, scope: str = "all") -> dict[str, nn.Linear]:
    """The maskable Linears of a model in a scope of `SCOPES`, by module name, in the model's order."""
    within = SCOPES[scope]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _TARGET.search(name) and within(name)
    }
