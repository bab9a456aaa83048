"""What an engine has done so far, and what it holds. Knows numbers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Totals since the engine was made; read by metrics and benchmarks."""

    steps: int = 0  # forward passes
    failures: int = 0  # forward passes that failed
    computed: int = 0  # positions that went through the model
    cached: int = 0  # positions that did not have to, because they were found in the cache
    sampled: int = 0  # tokens of answers
    preemptions: int = 0


@dataclass(frozen=True)
class Occupancy:
    """What an engine holds at a moment."""

    waiting: int  # requests
    running: int  # requests
    masks: int  # distinct ones that are worn in the batch
    pages_held: int  # by requests
    pages_kept: int  # held by nobody, and worth finding again
    pages_blank: int
