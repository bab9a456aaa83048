"""How a command says on stderr how far the model is loaded."""

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
    """A bar that goes away where stderr is a terminal, and lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield tell_quarters(partial(print, file=sys.stderr, flush=True))
        return
    columns = TextColumn("loading the model"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def tell_quarters(say: Callable[[str], None]) -> Report:
    """Say each quarter that is done."""
    told = 0

    def report(done: int, total: int) -> None:
        nonlocal told
        if (quarter := 4 * done // total) > told:
            told = quarter
            say(f"loading the model: {25 * quarter} % of {total / 1e6:.0f} MB")

    return report
