"""The memory of a machine, and numbers of bytes as text. Imports torch only where it asks a GPU."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from masquerade.errors import InvalidValue

_MEMINFO = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container
_UNITS = {"": 0, "b": 0, "k": 1, "kb": 1, "kib": 1, "m": 2, "mb": 2, "mib": 2, "g": 3, "gb": 3, "gib": 3}
_UNITS |= {"t": 4, "tb": 4, "tib": 4}


@dataclass(frozen=True)
class MachineMemory:
    """The memory of a host or of a GPU, in bytes."""

    total: int
    available: int
    swap: int = 0
    limit: int | None = None  # of the container

    @property
    def usable(self) -> int:
        """The most that this process may have."""
        return self.total if self.limit is None else min(self.total, self.limit)


def read_host_memory() -> MachineMemory | None:
    """The host's memory; None where the system does not tell."""
    if not _MEMINFO.exists():
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
        return MachineMemory(total, total)
    found = {key: 1024 * int(kib) for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", _MEMINFO.read_text(), re.MULTILINE)}
    maximum = _LIMIT.read_text().strip() if _LIMIT.exists() else "max"
    limit = None if maximum == "max" else int(maximum)
    return MachineMemory(
        found["MemTotal"], found.get("MemAvailable", found["MemTotal"]), found.get("SwapTotal", 0), limit
    )


def read_memory(device: str, gpus: int = 1) -> MachineMemory | None:
    """The memory of a device (`cpu` or `cuda`), or of several GPUs together; None where it cannot be read."""
    if device == "cpu":
        return read_host_memory()
    import torch

    if torch.cuda.device_count() < gpus:
        return None
    free, total = map(sum, zip(*(torch.cuda.mem_get_info(number) for number in range(gpus)), strict=True))
    return MachineMemory(total, free)


def parse_bytes(text: str, option: str) -> int:
    """The number of bytes of `24GiB`, `24GB`, `24g` or `25769803776`.

    A unit with `i`, or of one letter, is a power of 1024, any other a power of 1000. Raises `InvalidValue`, which names
    the option.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = found[2].lower() if found else ""
    nbytes = 0
    if found and unit in _UNITS:
        base = 1000 if unit.endswith("b") and "i" not in unit else 1024
        nbytes = int(Fraction(found[1]) * base ** _UNITS[unit])
    if nbytes < 1:
        raise InvalidValue(f"{option} is {text!r:.80}; give bytes, such as 24GiB, 24GB or 25769803776", param=option)
    return nbytes


def format_bytes(count: float) -> str:
    """A number of bytes in a unit in which it is below 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
