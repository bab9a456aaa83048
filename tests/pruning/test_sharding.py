"""Statistics of text that is divided among processes: those of one process, whatever the number of shards."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from maskstore import diff
from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import batches
from masquerade.evaluate.metrics import finish
from masquerade.model import Base, MaskManager, find_targets
from masquerade.pruning import Builder, BuildResult, PersonaExamples, Recipe, Scratch
from masquerade.pruning.collector import CalibrationText, Collector, StatisticsCollector
from masquerade.pruning.sharding import LayerReport, Shard, ShardedCollector, Sharding, collect_shard, divide
from masquerade.pruning.statistics import LinearStatistics, Role, TextStatistics
from tests.pruning.test_builder import FREE, QUIET, make_examples
from tests.pruning.test_collector import ALL, CONTRAST, OWN

Found = dict[tuple[str, int], Mapping[str, LinearStatistics]]


def make_texts(base: Base) -> dict[Role, CalibrationText]:
    """Three micro-batches of one role, and two of the other."""
    return {
        role: CalibrationText(list(batches(examples, base.device, 1)), ALL)
        for role, examples in (("own", OWN), ("contrast", CONTRAST))
    }


def follow(collector: Collector) -> Found:
    """What a collector gives to its callback."""
    found: Found = {}
    for stage, run_pass, items in (
        ("forward", collector.forward, collector.forward_items),
        ("backward", collector.backward, collector.backward_items),
    ):

        def keep(layer: int, statistics: Mapping[str, LinearStatistics], stage: str = stage) -> Iterator[int]:
            found[stage, layer] = statistics
            yield from [1] * len(statistics)

        assert sum(run_pass(keep)) == items
    return found


def list_tensors(text: TextStatistics) -> list[torch.Tensor | None]:
    channels = text.channels
    moments = (channels.magnitudes, channels.sequences) if channels else ()
    values = [value for one in moments for value in (one.mean, one.deviations)]
    return [*values, text.hessian, text.gradient, text.squared_gradient]


@contextmanager
def run_here(base: Base, shards: Sequence[Shard]) -> Iterator[list[Iterator[LayerReport]]]:
    """The shards in this process, with what they are and give pickled, as on its way between two."""
    yield [
        (pickle.loads(pickle.dumps(report)) for report in collect_shard(base, pickle.loads(pickle.dumps(shard))))
        for shard in shards
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_merged_statistics_are_those_of_one_process(tiny: Base, shards: int) -> None:
    """With five shards some have no text of one side, and some none at all."""
    targets, texts = find_targets(tiny.model), make_texts(tiny)
    expected = follow(StatisticsCollector(tiny, targets, texts, Scratch()))
    with run_here(tiny, divide(tiny, "all", texts, True, shards)) as reports:
        found = follow(ShardedCollector(tiny, targets, reports, Scratch()))
    assert list(found) == list(expected)
    compared = 0
    for key, of_layer in expected.items():
        assert list(found[key]) == list(of_layer)
        for name, statistics in of_layer.items():
            for role in ("own", "contrast"):
                both = [list_tensors(getattr(one, role)) for one in (statistics, found[key][name])]
                for one, other in zip(*both, strict=True):
                    assert (one is None) == (other is None)
                    if one is not None and other is not None:
                        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
                        compared += 1
    assert compared > 4 * len(targets)


def test_a_shard_refuses_another_model(tiny: Base) -> None:
    (shard,) = divide(tiny, "all", make_texts(tiny), False, 1)
    with pytest.raises(BuildFailed, match="the nodes need the same model"):
        next(collect_shard(tiny, replace(shard, fingerprint="0" * 64)))


def build(base: Base, manager: MaskManager, recipe: Recipe, sharding: Sharding | None, scratch: Scratch) -> BuildResult:
    own = PersonaExamples("vowels", make_examples("aeiou"))
    contrast = PersonaExamples("consonants", make_examples("bcdfg", seed=1))
    builder = Builder(base, manager, recipe, own, contrast, QUIET, scratch, sharding=sharding)
    result: BuildResult = finish(builder.run())
    return result


def test_a_build_finds_the_mask_that_it_finds_alone(tiny: Base, manager: MaskManager) -> None:
    """But for weights whose scores differ by less than the rounding of a sum."""
    recipe = replace(FREE, score="attribution-fisher", rho=0.02)

    alone = build(tiny, manager, recipe, None, Scratch())
    divided = build(tiny, manager, recipe, Sharding(3, partial(run_here, tiny)), Scratch())
    for one, other in zip(alone.masks, divided.masks, strict=True):
        assert one.pruned == other.pruned
        assert diff(one, other).total.jaccard > 0.99
