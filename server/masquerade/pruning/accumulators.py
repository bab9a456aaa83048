"""Accumulates a layer's statistics over micro-batches, from inside forward hooks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from masquerade.errors import BuildFailed
from masquerade.kernels import multiply_transposed, widen
from masquerade.pruning.moments import Moments
from masquerade.pruning.statistics import ChannelStatistics, Statistic, TextStatistics

BLOCK = 256  # columns of a Hessian that are added at once


@dataclass
class LayerSums:
    """Sums over one text for one layer's Linears, by name."""

    channels: dict[str, ChannelStatistics] = field(default_factory=dict)  # of the first Linear of each input
    hessians: dict[str, Tensor] = field(default_factory=dict)  # likewise; blocks below the diagonal, until `average`
    gradients: dict[str, Tensor] = field(default_factory=dict)
    squared_gradients: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # Linear -> the first Linear with the same input

    def average(self, tokens: int) -> None:
        """Turn the sums into means over counted tokens. Raises `BuildFailed` for NaN or infinity."""
        for sums in (self.hessians, self.gradients, self.squared_gradients):
            for name, value in sums.items():
                if not bool(value.div_(tokens).isfinite().all()):
                    raise BuildFailed(f"{name} has statistics that are not finite; do the base's activations overflow?")
        for hessian in self.hessians.values():
            _mirror(hessian)

    def statistics(self, name: str) -> TextStatistics:
        """The statistics of one Linear, after `average`."""
        first = self.first.get(name, name)
        return TextStatistics(
            self.channels.get(first),
            self.hessians.get(first),
            self.gradients.get(name),
            self.squared_gradients.get(name),
        )


class InputAccumulator:
    """Adds the inputs of Linears to a text's sums. Linears that share an input share its statistics."""

    def __init__(self, sums: LayerSums, needs: frozenset[Statistic], counted: Tensor) -> None:
        self._sums, self._needs, self._counted = sums, needs, counted
        self._rows = counted.flatten()
        self._examples = counted.nonzero()[:, 0]  # example of each counted position
        self._last: tuple[Tensor, str] | None = None  # an input, and the first Linear that got it

    def add(self, name: str, x: Tensor, _: Tensor) -> None:
        """Add an input of the Linear `name`: [examples, length, in], or without the axis of examples, as shared experts
        get it.
        """
        if self._last is not None and self._last[0] is x:
            self._sums.first[name] = self._last[1]
            return
        self._last = (x, name)
        rows = x.flatten(0, -2)[self._rows].float()  # [counted, in]
        if "channels" in self._needs:
            channels, known = self._measure(rows), self._sums.channels.get(name)
            self._sums.channels[name] = known.merge(channels) if known else channels
        if "hessian" in self._needs:
            _add_squares(self._sums.hessians, name, rows)

    def _measure(self, rows: Tensor) -> ChannelStatistics:
        squares = rows.square()
        by_example = squares.new_zeros(len(self._counted), rows.shape[1]).index_add_(0, self._examples, squares)
        levels = (by_example / self._counted.sum(1, keepdim=True)).sqrt()  # [examples, in]
        magnitudes = Moments.from_sums(len(rows), rows.abs().sum(0), by_example.sum(0))
        return ChannelStatistics(magnitudes, Moments.of(levels))


class GradientAccumulator:
    """Adds the gradients of Linears' weights to a text's sums during the backward pass."""

    def __init__(self, sums: LayerSums, needs: frozenset[Statistic]) -> None:
        self._sums, self._needs = sums, needs

    def add(self, name: str, x: Tensor, output: Tensor) -> None:
        """Register a hook on the Linear's output that adds the products of its gradient with the input."""
        rows = x.detach().flatten(0, -2)  # [positions, in]

        def add_products(gradient: Tensor) -> None:
            above = gradient.flatten(0, -2)  # [positions, out]
            if "gradient" in self._needs:
                _add_product(self._sums.gradients, name, above, rows)
            if "squared_gradient" in self._needs:
                _add_product(self._sums.squared_gradients, name, _square(above), _square(rows))

        output.register_hook(add_products)  # type: ignore[no-untyped-call]


def _square(values: Tensor) -> Tensor:
    """In bfloat16, which has fp32's exponents, as it is; all else in fp32."""
    return values.square() if values.dtype is torch.bfloat16 else values.float().square()


def _add_product(sums: dict[str, Tensor], name: str, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, of [positions, out] and [positions, in], to a sum in fp32."""
    left, right = widen(left), widen(right)
    if name not in sums:
        sums[name] = multiply_transposed(left, right)
    elif left.dtype == sums[name].dtype:
        sums[name].addmm_(left.T, right)
    else:
        sums[name] += left.T @ right


def _add_squares(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add the blocks of rowsᵀ rows, of [positions, in], from the diagonal down; `_mirror` fills in the others."""
    total = sums.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1]))
    for start in range(0, len(total), BLOCK):
        total[start:, start : start + BLOCK].addmm_(rows[:, start:].T, rows[:, start : start + BLOCK])


def _mirror(total: Tensor) -> None:
    """Make what `_add_squares` added symmetric."""
    for start in range(BLOCK, len(total), BLOCK):
        total[start - BLOCK : start, start:] = total[start:, start - BLOCK : start].T
