"""The rows of the reliability page: a promise, how it was tested, how often, and the result."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- record -->", "<!-- end of the record -->"
COLUMNS = ("promise", "tried by", "count", "result")


@dataclass(frozen=True)
class Row:
    """A promise after it was tried. `kept` is None where it could not be tried here; the result says why."""

    promise: str
    test: str
    count: str
    result: str
    kept: bool | None


@dataclass(frozen=True)
class Part:
    """The rows of one part, and how long they took."""

    name: str
    rows: tuple[Row, ...]
    seconds: float


@dataclass(frozen=True)
class Scale:
    """How much of a full run is done: 1 is all of it. `seed` decides everything that is drawn."""

    share: float
    seed: int

    def of(self, full: float, least: float = 1) -> int:
        """A count, or whole seconds, of a full run."""
        return round(max(least, full * self.share))


@dataclass
class Progress:
    """Says on stderr how far a part is and how long it will still take."""

    part: str
    started: float = field(default_factory=time.monotonic)
    _said: float = 0.0

    def __call__(self, done: float, total: float, what: str) -> None:
        now = time.monotonic()
        if now - self._said < 5 and done < total:
            return
        self._said = now
        spent = now - self.started
        left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"[{self.part}] {done:.0f}/{total:.0f} {what} after {spent:.0f} s{left}", file=sys.stderr, flush=True)


Play = Callable[[Scale, Progress], Iterable[Row]]


def play(name: str, part: Play, scale: Scale) -> Part:
    """Run a part; a fault of its own is a broken promise."""
    progress, rows = Progress(name), []
    try:
        for row in part(scale, progress):
            rows.append(row)
            print(f"[{name}] {_verdict(row)}: {row.promise} ({row.count}): {row.result}", file=sys.stderr, flush=True)
    except Exception as error:
        import traceback

        traceback.print_exc()
        rows.append(Row("the test runs to its end", name, "1", f"{type(error).__name__}: {error}"[:500], kept=False))
    return Part(name, tuple(rows), time.monotonic() - progress.started)


def is_kept(parts: Iterable[Part]) -> bool:
    """Whether no promise was broken."""
    return all(row.kept is not False for part in parts for row in part.rows)


def describe_run(scale: Scale, seconds: float) -> dict[str, Any]:
    """When and where, and how long it took."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": _name_hardware(),
        "python": platform.python_version(),
        "minutes": round(seconds / 60, 1),
        "share": scale.share,
        "seed": scale.seed,
    }


def to_json(parts: Iterable[Part], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "kept": is_kept(parts), "parts": [asdict(part) for part in parts]}


def to_markdown(parts: Iterable[Part], about: dict[str, Any]) -> str:
    """A line about the run and a table a part."""
    size = "the full run" if about["share"] == 1 else f"{about['share']:.3g} of the full run"
    lines = [
        f"{about['date']}, {about['hardware']}, Python {about['python']}; {size}, seed {about['seed']}, "
        f"{about['minutes']:.0f} minutes."
    ]
    for part in parts:
        lines += ["", f"### {part.name.capitalize()} ({part.seconds:.0f} s)", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        lines += [
            f"| {row.promise} | {row.test} | {row.count} | **{_verdict(row)}**; {row.result} |".replace("\n", " ")
            for row in part.rows
        ]
    return "\n".join(lines)


def record(page: Path, text: str) -> None:
    """Put a text between the two markers of a page, in place of what was there."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{page} has no {BEGIN}"
    assert end, f"{page} has no {END}"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _verdict(row: Row) -> str:
    return {True: "kept", False: "BROKEN", None: "not tried"}[row.kept]


def _name_hardware() -> str:
    import os

    named = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{os.cpu_count()} cores of a shared {named[0] if named else platform.machine()}"
