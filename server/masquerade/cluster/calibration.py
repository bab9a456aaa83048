"""Collects the shards of a calibration as tasks of a Ray cluster, each of which loads the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers.utils import logging

from masquerade.cluster.connection import connect
from masquerade.errors import MasqueradeError, NotReady
from masquerade.model import load
from masquerade.pruning.sharding import LayerReport, Shard, collect_shard

ROOM_SECONDS = 300.0  # for the cluster to have room for all shards
AHEAD = 2  # reports that a shard makes before the first of them is read
RETRIES = 2  # of a task whose process or node dies; it begins again, and reports that were read are not read again


@dataclass(frozen=True)
class ShardTasks:
    """How shards are collected on a cluster."""

    address: str  # of the cluster
    model: str  # that each node can load
    options: Mapping[str, Any]  # of `load`
    cpus: float  # that a task takes
    gpus: float

    @contextmanager
    def run(self, shards: Sequence[Shard]) -> Iterator[list[Iterator[LayerReport]]]:
        """Start a task for each shard, and wait for their first reports.

        All have their places before one starts, since each waits for the others.

        Raises `NotReady` if no cluster answers or it has no room for them. The reports raise what a task raises, and
        `ChildProcessError` if it was lost.
        """
        threads = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(self.cpus)))}}
        cpus, gpus = self.cpus * len(shards), self.gpus * len(shards)
        with connect(self.address, cpus=math.ceil(cpus), gpus=math.ceil(gpus)):
            places = placement_group([{"CPU": self.cpus, "GPU": self.gpus}] * len(shards), strategy="SPREAD")
            if not places.wait(ROOM_SECONDS):
                raise NotReady(
                    f"the Ray cluster had no room for {len(shards)} shards at once, with {cpus:g} cores and {gpus:g} "
                    f"GPUs in all, within {ROOM_SECONDS:.0f} s"
                )
            task: Any = ray.remote(
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                max_retries=RETRIES,
                runtime_env=threads,
                scheduling_strategy=PlacementGroupSchedulingStrategy(places),
            )(_collect)
            task = task.options(_generator_backpressure_num_objects=AHEAD)
            running = [task.remote(self.model, self.options, shard) for shard in shards]
            first = [next(reports) for reports in running]
            ray.wait(first, num_returns=len(shards))  # until all have loaded the model
            yield [_read(chain([report], reports)) for report, reports in zip(first, running, strict=True)]


def _collect(model: str, options: Mapping[str, Any], shard: Shard) -> Iterator[LayerReport]:
    logging.disable_progress_bar()  # it would be among the lines of the build
    yield from collect_shard(load(model, **options), shard)


def _read(reports: Iterator[Any]) -> Iterator[LayerReport]:
    """The reports that arrive from a task."""
    try:
        for report in reports:
            yield ray.get(report)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MasqueradeError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ChildProcessError(
            f"a shard of this build was lost: {str(error).strip().splitlines()[-1]}; the same command begins its "
            "statistics again"
        ) from error
