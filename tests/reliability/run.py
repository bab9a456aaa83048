"""`python -m tests.reliability.run [--quick | --minutes N] [--only soak,chaos,...] [--seed N] [--json] [--record PAGE]`

Runs the parts, three at a time where nothing is timed, says on stderr how far it is, prints the table (or JSON) on
stdout, and exits 1 if a promise was broken. `--record docs/reliability.md` writes the table into that page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from tests.reliability import report

GROUPS = (
    ("soak",),
    ("stalls",),
    ("chaos", "faults", "hostile", "isolation"),
)  # parts of a group run at once; the first two are timed
AT_ONCE = 3  # the longest begins at once; faults mostly wait
PARTS = tuple(part for group in GROUPS for part in group)
FULL_MINUTES = 45.0
QUICK_MINUTES = 1.0  # of the share that is done; what each part needs at least takes another


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    options = _read(arguments)
    scale = report.Scale(options.minutes / FULL_MINUTES, options.seed)
    print(f"seed {scale.seed}, {options.minutes:g} of {FULL_MINUTES:g} minutes", file=sys.stderr)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    parts: list[report.Part] = []
    started = time.monotonic()
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        for group in GROUPS:
            parts += pool.map(partial(run_part, scale), [name for name in group if name in options.only])
    about = report.describe_run(scale, time.monotonic() - started)
    table = report.to_markdown(parts, about)
    print(json.dumps(report.to_json(parts, about), indent=1) if options.json else table)
    if options.record:
        report.record(options.record, table)
    sys.exit(0 if report.is_kept(parts) else 1)


def run_part(scale: report.Scale, name: str) -> report.Part:
    """One part, in a process of its own."""
    return report.play(name, import_module(f"tests.reliability.{name}").play, scale)


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.run", description="What the server promises, tried."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--minutes", type=float, default=FULL_MINUTES, help="about how long; 45 is the full record")
    size.add_argument("--quick", dest="minutes", action="store_const", const=QUICK_MINUTES, help="about 4 minutes")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--record", type=Path, help="a page with the markers of the record")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    return options


if __name__ == "__main__":
    main()
