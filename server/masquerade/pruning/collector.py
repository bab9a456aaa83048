"""Collects statistics one decoder layer at a time.

A forward pass gives activations and Hessians, a backward pass gradients and squared gradients. No weight is changed,
and padding is never counted.

Work is ordered by layer, then by micro-batch; the hidden states of all micro-batches between two layers are kept in
`Scratch`. A Hessian or a gradient exists only while its layer is processed. Peak memory is

    the base + the statistics of one layer's targets + the activations of one micro-batch in one layer (and its logits),

and the hidden states (tokens x hidden size), in memory or on disk as `Scratch` is: one layer's for forward statistics,
every layer's for gradients. The gradient of a weight is the product of the Linear's input and its output's gradient, so
weights never require gradients. The backward pass computes each layer again, without the products that are only added
to its output (down_proj's, in a Llama).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from masquerade.evaluate.dataset import MicroBatch
from masquerade.kernels import log_probabilities
from masquerade.model import Base, find_targets
from masquerade.pruning.accumulators import GradientAccumulator, InputAccumulator, LayerSums
from masquerade.pruning.hooks import find_added, observed, without_products
from masquerade.pruning.layerwise import Arguments, LayerwiseModel, group_by_layer
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import NO_STATISTICS, LinearStatistics, Role, Statistic, TextStatistics

# layer, statistics by target -> work items; each yields the layer of targets that it completes
LayerCallback = Callable[[int, Mapping[str, LinearStatistics]], Iterator[int]]


class Collector(Protocol):
    """Passes over calibration text; `on_layer(layer, statistics)` is called when a layer's statistics are complete.

    `forward` and `backward` generate work items, including those of `on_layer`. An item yields the number of
    parts that it completes, of `forward_items` and `backward_items` in all.
    """

    forward_items: int
    backward_items: int

    def forward(self, on_layer: LayerCallback) -> Iterator[int]:
        """Pass all text through all layers, for activations and Hessians, and to prepare `backward`."""

    def backward(self, on_layer: LayerCallback) -> Iterator[int]:
        """Pass the gradient of the responses' log-likelihood from the last layer to the first. Run `forward` before."""


@dataclass(frozen=True)
class CalibrationText:
    """One role's text in micro-batches, and the statistics that are needed of it."""

    batches: Sequence[MicroBatch]
    needs: frozenset[Statistic]

    @property
    def tokens(self) -> int:
        """Number of counted positions."""
        return sum(int(batch.predicts.sum()) for batch in self.batches)


@dataclass(frozen=True)
class _Item:
    """A micro-batch of a role."""

    role: Role
    index: int
    batch: MicroBatch

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


class StatisticsCollector:
    """Collects in this process. What an item completes are micro-batches of a layer, and targets.

    A layer that is completed in `scratch` already is one item without a call.
    """

    def __init__(
        self, base: Base, targets: Mapping[str, nn.Linear], texts: Mapping[Role, CalibrationText], scratch: Scratch
    ) -> None:
        self._base, self._texts, self._scratch = base, texts, scratch
        self._model = LayerwiseModel(base)
        self._layers = self._model.layers
        self._targets, self._linears = (
            group_by_layer(linears, len(self._layers)) for linears in (targets, find_targets(base.model))
        )
        self._items = [_Item(role, i, batch) for role, text in texts.items() for i, batch in enumerate(text.batches)]
        self._traced = [item for item in self._items if self._is_traced(item)]
        self._tokens = {role: text.tokens for role, text in texts.items()}
        self._arguments: dict[str, list[Arguments]] = {}  # of every layer, by item
        linears = sum(map(len, self._targets))
        self.forward_items = len(self._items) * (len(self._layers) + 1) + linears
        self.backward_items = len(self._traced) * len(self._layers) + linears

    def forward(self, on_layer: LayerCallback) -> Iterator[int]:
        """Pass all text through all layers, for activations and Hessians, and to prepare `backward`."""
        for item in self._items:
            self._embed(item)
            yield 1
        for layer, targets in enumerate(self._targets):
            if is_done(self._scratch, "forward", layer):
                yield len(self._items) + len(targets)
                continue
            sums: dict[Role, LayerSums] = {role: LayerSums() for role in self._texts}
            for item in self._items:
                if layer < len(self._layers) - 1 or self._texts[item.role].needs & {"channels", "hessian"}:
                    self._forward_layer(item, layer, sums[item.role])
                if layer and not self._is_traced(item):
                    self._scratch.drop(f"hidden/{layer - 1}/{item.name}")
                yield 1
            yield from on_layer(layer, self._statistics(layer, sums))
            finish_layer(self._scratch, "forward", layer)
        for item in self._items:
            if not self._is_traced(item):
                self._scratch.drop(f"hidden/{len(self._layers) - 1}/{item.name}")

    def backward(self, on_layer: LayerCallback) -> Iterator[int]:
        """Pass the gradient of the responses' log-likelihood from the last layer to the first. Run `forward` before."""
        for layer, targets in reversed(list(enumerate(self._targets))):
            if is_done(self._scratch, "backward", layer):
                yield len(self._traced) + len(targets)
                continue
            sums: dict[Role, LayerSums] = {role: LayerSums() for role in self._texts}
            added: Sequence[nn.Linear] = ()
            for item in self._traced:
                added = self._backward_layer(item, layer, sums[item.role], added)
                self._scratch.drop(f"hidden/{layer + 1}/{item.name}")
                self._scratch.drop(f"gradient/{layer + 2}/{item.name}")
                yield 1
            yield from on_layer(layer, self._statistics(layer, sums))
            finish_layer(self._scratch, "backward", layer)
        self._scratch.drop("hidden")
        self._scratch.drop("gradient")

    def _is_traced(self, item: _Item) -> bool:
        return bool(self._texts[item.role].needs & {"gradient", "squared_gradient"})

    def _embed(self, item: _Item) -> None:
        """Record the first layer's input and every layer's other arguments."""
        hidden, self._arguments[item.name] = self._model.enter(input_ids=item.batch.ids, use_cache=False)
        if not is_done(self._scratch, "forward", 0):
            self._scratch.put(f"hidden/0/{item.name}", {"states": hidden})

    def _forward_layer(self, item: _Item, layer: int, sums: LayerSums) -> None:
        hidden = self._load(f"hidden/{layer}/{item.name}")
        inputs = InputAccumulator(sums, self._texts[item.role].needs, item.batch.predicts)
        with observed(self._targets[layer], inputs.add), torch.no_grad():
            output = self._run(layer, item, hidden)
        if layer < len(self._layers) - 1:
            self._scratch.put(f"hidden/{layer + 1}/{item.name}", {"states": output})

    def _backward_layer(
        self, item: _Item, layer: int, sums: LayerSums, added: Sequence[nn.Linear]
    ) -> Sequence[nn.Linear]:
        """Pass an item's gradient back through a layer. Returns the Linears that are only added to the layer's output.

        Which ones these are depends on the layer's code and not on the item; for the next items, as `added`, their
        products are not computed. The last layer's are always computed: the head's gradient needs its output.
        """
        hidden = self._load(f"hidden/{layer}/{item.name}").requires_grad_(True)
        gradients = GradientAccumulator(sums, self._texts[item.role].needs)
        above = None if layer == len(self._layers) - 1 else self._load(f"gradient/{layer + 1}/{item.name}")
        made: dict[str, Tensor] = {}

        def keep(name: str, _: Tensor, output: Tensor) -> None:
            made[name] = output

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(observed(self._targets[layer], gradients.add))
            stack.enter_context(without_products(added))
            if not added and above is not None:
                stack.enter_context(observed(self._linears[layer], keep))
            output = self._run(layer, item, hidden)
            found = [self._linears[layer][name] for name in find_added(output, made)]
            if above is None:
                above = self._head_gradient(item, output.detach())
            (below,) = torch.autograd.grad(output, hidden, above)
        if layer:
            self._scratch.put(f"gradient/{layer}/{item.name}", {"states": below})
        return found or added

    def _head_gradient(self, item: _Item, output: Tensor) -> Tensor:
        """d (sum of the counted tokens' log-likelihoods) / d (the last layer's output)."""
        counted = item.batch.predicts
        leaf = output[counted].requires_grad_(True)  # [counted, hidden]
        logits = self._model.predict(leaf)
        following = item.batch.ids.roll(-1, 1)[counted]  # the last position of a row is never counted
        (gradient,) = torch.autograd.grad(log_probabilities(logits, following).sum(), leaf)
        above = torch.zeros_like(output)
        above[counted] = gradient
        return above

    def _run(self, layer: int, item: _Item, hidden: Tensor) -> Tensor:
        return self._model.run(layer, hidden, self._arguments[item.name][layer])

    def _load(self, name: str) -> Tensor:
        return self._scratch.get(name)["states"].to(self._base.device).detach()

    def _statistics(self, layer: int, sums: Mapping[Role, LayerSums]) -> dict[str, LinearStatistics]:
        """The statistics of a layer's targets. Raises `BuildFailed` for NaN or infinity."""
        for role, of_role in sums.items():
            of_role.average(self._tokens[role])

        def find(name: str, role: Role) -> TextStatistics:
            return sums[role].statistics(name) if role in sums else NO_STATISTICS

        return {
            name: LinearStatistics(find(name, "own"), find(name, "contrast"), find(name, "neutral"))
            for name in self._targets[layer]
        }


def is_done(scratch: Scratch, stage: str, layer: int) -> bool:
    """Whether a pass has completed a layer."""
    return f"done/{stage}-{layer}" in scratch


def finish_layer(scratch: Scratch, stage: str, layer: int) -> None:
    """Record that a pass has completed a layer."""
    scratch.put(f"done/{stage}-{layer}", {"layer": torch.tensor(layer)})
