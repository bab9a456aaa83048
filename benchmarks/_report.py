"""The output of a benchmark: figures with their bounds."""

import argparse
import json
import operator
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class LeftOut:
    """What a run does not measure."""

    name: str
    why: str


Result = TypeVar("Result", bound=Figure | LeftOut)


def arguments(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `quick` is the help text of `--quick`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def follow(benchmark: str, results: Iterable[Result], out: Path | None = None) -> list[Result]:
    """Print each result on stderr as it comes, and append it to a file of JSON lines, after a line that describes the
    run: one that is cut off loses nothing.
    """
    followed = []
    if out:
        _append(out, _describe_run(benchmark))
    for result in results:
        followed.append(result)
        if isinstance(result, Figure):
            print(f"{result.name}: {result.value:.4g} {result.unit}", file=sys.stderr, flush=True)
        else:
            print(f"left out: {result.name}; {result.why}", file=sys.stderr, flush=True)
        if out:
            _append(out, _to_json(result))
    return followed


def _append(out: Path, line: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def report(benchmark: str, results: Sequence[Figure | LeftOut], as_json: bool) -> None:
    """Print one JSON object, or a table."""
    found = describe(benchmark, results)
    if as_json:
        print(json.dumps(found))
        return
    for row in found["figures"]:
        bound = f"{row['reach']} {'ok' if row['ok'] else 'MISSED'}" if row["reach"] else ""
        print(f"{row['name']:<72} {row['value']:>10.3f} {row['unit']:<18} {bound}")
    for row in found.get("left_out", ()):
        print(f"left out: {row['name']}; {row['why']}")


def describe(benchmark: str, results: Sequence[Figure | LeftOut]) -> dict[str, Any]:
    """The JSON object of a report. It has `left_out` if anything is."""
    figures, missing = (
        [_to_json(result) for result in results if isinstance(result, kind)] for kind in (Figure, LeftOut)
    )
    return _describe_run(benchmark) | {"figures": figures} | ({"left_out": missing} if missing else {})


def _describe_run(benchmark: str) -> dict[str, Any]:
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "date": date, "hardware": hardware()}


def _to_json(result: Figure | LeftOut) -> dict[str, Any]:
    if isinstance(result, LeftOut):
        return {"name": result.name, "why": result.why}
    value, ok = round(result.value, 4), result.ok
    return {"name": result.name, "value": value, "unit": result.unit, "reach": result.reach, "ok": ok}


def hardware() -> dict[str, Any]:
    """Processor, cores and memory, without the name of the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch: Any = sys.modules.get("torch")  # a benchmark without it has no device either
    gpu = {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}
    system = platform.system()
    return {"cpu": model, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1), "system": system, **gpu}
