"""Counters of an engine, and what it holds at a moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Totals since the engine was created, for metrics and benchmarks."""

    steps: int = 0  # forward passes
    failures: int = 0  # forward passes that failed
    computed: int = 0  # positions computed by the model
    cached: int = 0  # positions found in the cache instead
    sampled: int = 0  # output tokens
    drafted: int = 0  # tokens of drafts
    accepted: int = 0  # those of them that became output tokens
    preemptions: int = 0


@dataclass(frozen=True)
class Occupancy:
    """Requests, masks and blocks of an engine at a moment."""

    waiting: int  # requests
    running: int  # requests
    masks: int  # distinct masks in the batch
    blocks_used: int
    blocks_cached: int  # unused, and can be found by prefix hash
    blocks_empty: int
