"""Collects statistics of text that is divided among processes, each of which has the base, and merges them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal, Self

import torch
from torch import nn

from masquerade.errors import BuildFailed
from masquerade.model import Base, find_layers, find_targets
from masquerade.pruning.collector import CalibrationText, LayerCallback, StatisticsCollector, finish_layer, is_done
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import LinearStatistics, Role

Stage = Literal["forward", "backward"]


@dataclass(frozen=True)
class Shard:
    """A part of the calibration text, and what is to be collected of it. It can be pickled."""

    fingerprint: str  # of the base
    scope: str
    texts: Mapping[Role, CalibrationText]
    backward: bool  # whether there is a backward pass


@dataclass(frozen=True)
class LayerReport:
    """The statistics of a layer's Linears on a shard, on the CPU, and the number of counted tokens of each text."""

    stage: Stage
    layer: int
    statistics: Mapping[str, LinearStatistics]
    tokens: Mapping[Role, int]

    def merge(self, other: Self) -> Self:
        """The report of both shards together."""
        tokens = {role: count + other.tokens[role] for role, count in self.tokens.items()}
        shares = {role: other.tokens[role] / max(1, count) for role, count in tokens.items()}
        statistics = {name: one.merge(other.statistics[name], shares) for name, one in self.statistics.items()}
        return type(self)(self.stage, self.layer, statistics, tokens)


# Collects each shard elsewhere, until the context ends; the reports of a shard are in the order of `collect_shard`
RunShards = Callable[[Sequence[Shard]], AbstractContextManager[Sequence[Iterator[LayerReport]]]]


@dataclass(frozen=True)
class Sharding:
    """Into how many shards calibration text is divided, and what collects them."""

    shards: int
    run: RunShards


def divide(base: Base, scope: str, texts: Mapping[Role, CalibrationText], backward: bool, shards: int) -> list[Shard]:
    """Parts of the calibration text, each with every so many micro-batches."""
    return [
        Shard(
            base.fingerprint,
            scope,
            {role: replace(text, batches=text.batches[part::shards]) for role, text in texts.items()},
            backward,
        )
        for part in range(shards)
    ]


def collect_shard(base: Base, shard: Shard) -> Iterator[LayerReport]:
    """The reports of a shard: of the first layer to the last, then of the last to the first for the backward pass.

    Raises `BuildFailed` for a base that is not the shard's, and for statistics that are not finite.
    """
    if base.fingerprint != shard.fingerprint:
        raise BuildFailed(
            f"a shard has loaded {base.name!r} with the fingerprint {base.fingerprint[:16]}, but the build's base has "
            f"{shard.fingerprint[:16]}; the nodes need the same model"
        )
    texts = {
        role: replace(text, batches=[batch.to(base.device) for batch in text.batches])
        for role, text in shard.texts.items()
    }
    collector = StatisticsCollector(base, find_targets(base.model, shard.scope), texts, Scratch())
    tokens = {role: text.tokens for role, text in texts.items()}
    ready: deque[LayerReport] = deque()

    def report(stage: Stage, layer: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
        of_layer = {name: one.to(torch.device("cpu")) for name, one in statistics.items()}
        ready.append(LayerReport(stage, layer, of_layer, tokens))
        yield len(statistics)

    passes = [collector.forward(partial(report, "forward"))]
    if shard.backward:
        passes.append(collector.backward(partial(report, "backward")))
    for _ in chain.from_iterable(passes):
        while ready:
            yield ready.popleft()


class ShardedCollector:
    """Does what a `StatisticsCollector` does, with passes that run elsewhere; waiting for a report is a work item.

    The statistics are those of one process, but for the rounding of sums. A build that was interrupted collects them
    again, and calls `on_layer` for the layers that are not completed in `scratch`. Two reports are in memory.
    """

    def __init__(
        self,
        base: Base,
        targets: Mapping[str, nn.Linear],
        reports: Sequence[Iterator[LayerReport]],
        scratch: Scratch,
    ) -> None:
        self._device, self._reports, self._scratch = base.device, reports, scratch
        self._layers = len(find_layers(base.model))
        self.forward_items = self.backward_items = self._layers * len(reports) + len(targets)

    def forward(self, on_layer: LayerCallback) -> Iterator[int]:
        """Merge what the forward passes give."""
        for layer in range(self._layers):
            yield from self._merge("forward", layer, on_layer)

    def backward(self, on_layer: LayerCallback) -> Iterator[int]:
        """Merge what the backward passes give. Run `forward` before."""
        for layer in reversed(range(self._layers)):
            yield from self._merge("backward", layer, on_layer)

    def _merge(self, stage: Stage, layer: int, on_layer: LayerCallback) -> Iterator[int]:
        merged: LayerReport | None = None
        for reports in self._reports:
            report = next(reports)
            assert (report.stage, report.layer) == (stage, layer)
            merged = report if merged is None else merged.merge(report)
            yield 1
        assert merged is not None
        if is_done(self._scratch, stage, layer):
            yield len(merged.statistics)
            return
        yield from on_layer(layer, {name: one.to(self._device) for name, one in merged.statistics.items()})
        finish_layer(self._scratch, stage, layer)
