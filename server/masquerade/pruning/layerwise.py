"""Runs a causal language model one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from masquerade.model import Base, find_layers, layer_number
from masquerade.pruning.differentiable import find_replacements
from masquerade.pruning.hooks import replaced

Arguments = dict[str, Any]  # what a layer is called with beside its input


class LayerwiseModel:
    """The layers of a base, and what is before and after them, as separate calls."""

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self.layers: Sequence[nn.Module] = find_layers(base.model)
        self._replacements = [find_replacements(layer) for layer in self.layers]

    @torch.no_grad()
    def enter(self, **inputs: Any) -> tuple[Tensor, list[Arguments]]:
        """The first layer's input, and every layer's arguments: runs the model without its layers."""
        states: list[Tensor] = []
        arguments: list[Arguments] = []

        def record(hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
            states.append(hidden)
            arguments.append(kwargs)
            if len(arguments) == len(self.layers):
                raise _Stop
            return hidden

        with replaced(self.layers, [record] * len(self.layers)), suppress(_Stop):
            self._model(**inputs)
        return states[0], arguments

    def run(self, layer: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """The output of a layer, in the shape of its input `hidden`."""
        with replaced(*self._replacements[layer]):
            output = self.layers[layer](hidden, **arguments)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits [positions, vocabulary] of the last layer's output [positions, hidden], which may require gradients.

        The norm and the LM head after the layers act on each position alone, so any positions may be given.
        """

        def identity(states: Tensor, *_: Any, **__: Any) -> Tensor:
            return states

        def last_output(*_: Any, **__: Any) -> Tensor:
            return hidden.unsqueeze(0)

        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)  # stands for any input
        with replaced(self.layers, [identity] * (len(self.layers) - 1) + [last_output]):
            logits: Tensor = self._model(input_ids=token, use_cache=False).logits[0]
        return logits


def group_by_layer(linears: Mapping[str, nn.Linear], layers: int) -> list[dict[str, nn.Linear]]:
    """The Linears of each layer, by name."""
    found: list[dict[str, nn.Linear]] = [{} for _ in range(layers)]
    for name, linear in linears.items():
        found[layer_number(name)][name] = linear
    return found


class _Stop(Exception):
    """Ends a forward pass after the last layer's arguments are recorded."""
