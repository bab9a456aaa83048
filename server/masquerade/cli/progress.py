"""Progress of loading a model, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

if TYPE_CHECKING:
    from masquerade.model import Report


@contextmanager
def follow_loading() -> Iterator[Report]:
    """Yield a callback that draws a transient progress bar on a terminal, and prints lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield report_quarters(partial(print, file=sys.stderr, flush=True))
        return
    columns = TextColumn("loading the model"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report_quarters(write: Callable[[str], None]) -> Report:
    """A callback that writes a line each time another quarter is loaded."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if (quarter := 4 * done // total) > reported:
            reported = quarter
            write(f"loading the model: {25 * quarter} % of {total / 1e6:.0f} MB")

    return report
