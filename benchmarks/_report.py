"""The output of a benchmark: figures with their bounds."""

import argparse
import json
import operator
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_BOUNDS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """A measured value; `reach` is its bound, such as "<= 1.06", or None."""

    name: str
    value: float
    unit: str
    reach: str | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the bound is met; None without one."""
        if self.reach is None:
            return None
        sign, bound = self.reach.split()
        return bool(_BOUNDS[sign](self.value, float(bound)))


def arguments(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `quick` is the help text of `--quick`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def report(benchmark: str, figures: Sequence[Figure], as_json: bool) -> None:
    """Print one JSON object, or a table."""
    found = describe(benchmark, figures)
    if as_json:
        print(json.dumps(found))
        return
    for row in found["figures"]:
        bound = f"{row['reach']} {'ok' if row['ok'] else 'MISSED'}" if row["reach"] else ""
        print(f"{row['name']:<72} {row['value']:>10.3f} {row['unit']:<18} {bound}")


def describe(benchmark: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """The JSON object of a report."""
    rows = [{"name": f.name, "value": round(f.value, 4), "unit": f.unit, "reach": f.reach, "ok": f.ok} for f in figures]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": date, "hardware": hardware(), "figures": rows}


def hardware() -> dict[str, Any]:
    """Processor, cores and memory, without the name of the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch: Any = sys.modules.get("torch")  # a benchmark without it has no device either
    gpu = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}
    system = platform.system()
    return {"cpu": model, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1), "system": system, **gpu}
