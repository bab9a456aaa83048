"""The processors that this process may use, and how many threads compute on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"  # torch, its OpenMP runtime and MKL read it when they are imported
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


@dataclass(frozen=True)
class Processors:
    """What a process may compute on."""

    logical: int  # those that it may run on
    cores: int  # physical ones of these: two threads of a core share its multipliers
    quota: float | None = None  # of the container: processors' worth of time

    @property
    def threads(self) -> int:
        """How many threads should compute: one a core, and no more than the quota, beyond which all of them pause.

        `benchmarks.threads` measures other numbers.
        """
        return max(1, self.cores if self.quota is None else min(self.cores, int(self.quota)))


def read_processors() -> Processors:
    """The processors of this process."""
    numbers = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return Processors(len(numbers), len({_find_core(number) for number in numbers}), _read_quota())


def limit_threads() -> None:
    """Have torch use `Processors.threads`, unless the environment says how many; before torch is imported."""
    os.environ.setdefault(VARIABLE, str(read_processors().threads))


def _find_core(number: int) -> str:
    """The processors that share the core of one, in the kernel's words; its own number where that is not known."""
    try:
        return (_CPUS / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)


def _read_quota() -> float | None:
    try:
        share, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return None
    return None if share == "max" else int(share) / int(period)
