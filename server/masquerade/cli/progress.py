"""Progress of long work on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from masquerade.model import Report
    from masquerade.pruning.progress import Progress, Work

T = TypeVar("T")
LINE_SECONDS = 10.0  # least time between two lines about one stage


@contextmanager
def follow_loading() -> Iterator[Report]:
    """Yield a callback that draws a transient progress bar on a terminal, and prints lines elsewhere."""
    hide_loading_bars()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield report_quarters(partial(print, file=sys.stderr, flush=True))
        return
    columns = TextColumn("loading the model"), BarColumn(), DownloadColumn()
    with Bars(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def hide_loading_bars() -> None:
    """Turn off the progress bars of transformers, which would go into logs and between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def follow_stages() -> Iterator[Callable[[str], None]]:
    """Yield a callback for the name of what is going on: a status on a terminal, and lines elsewhere.

    A line is printed when the name changes, and every `LINE_SECONDS` until then.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield report_stages(partial(print, file=sys.stderr, flush=True))
        return
    with console.status("") as status:
        yield lambda stage: status.update(stage)


def report_stages(write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Callable[[str], None]:
    """A callback that writes a line for each new name, and for one that stays every `LINE_SECONDS`."""
    started = written = clock()
    current = ""

    def report(stage: str) -> None:
        nonlocal current, written
        now = clock()
        if stage != current or now - written >= LINE_SECONDS:
            current, written = stage, now
            write(f"{now - started:.0f} s: {stage}")

    return report


def report_quarters(write: Callable[[str], None]) -> Report:
    """A callback that writes a line each time another quarter is loaded."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if (quarter := 4 * done // total) > reported:
            reported = quarter
            write(f"loading the model: {25 * quarter} % of {total / 1e6:.0f} MB")

    return report


def follow(work: Work[T]) -> T:
    """Run the work; on a terminal with a bar for each stage, elsewhere with lines."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Bars(console=console) as bars:
            return _run(work, StageBars(bars))
    return _run(work, StageLines(partial(print, file=sys.stderr, flush=True)))


class StageBars:
    """A progress bar for each stage."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._stages: dict[str, Any] = {}

    def show(self, step: Progress) -> None:
        """Move the bar of the step's stage."""
        if step.stage not in self._stages:
            self._stages[step.stage] = self._bars.add_task(step.stage, total=step.total)
        self._bars.update(self._stages[step.stage], completed=step.done, total=step.total)

    def end(self) -> None:
        """Complete the bars of stages whose total was unknown."""
        for stage in self._stages.values():
            self._bars.update(stage, total=self._bars.tasks[stage].completed)


class StageLines:
    """A line when a stage ends, and in between at most one each `LINE_SECONDS`, with the time that it still takes.

    That time is estimated from the items so far; it is left out where a stage does not know its number of items.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._step: Progress | None = None
        self._began = self._seen = self._written = clock()

    def show(self, step: Progress) -> None:
        """Write a line if the stage is new or the last line is old."""
        now = self._clock()
        if self._step is not None and self._step.stage != step.stage:
            self.end()
            self._began = self._written = self._seen  # the first item of a stage is done when the stage is first seen
        self._step, self._seen = step, now
        if now - self._written < LINE_SECONDS or step.done == step.total:
            return
        self._written = now
        line = f"{step.stage}: {step.done}"
        if step.total:
            left = (now - self._began) * (step.total - step.done) / step.done
            line += f" of {step.total}, this stage takes about {_describe_seconds(left)} more"
        self._write(line)

    def end(self) -> None:
        """Write the line of a stage that has ended."""
        if self._step is not None:
            self._write(f"{self._step.stage}: done, {self._step.done} in {_describe_seconds(self._seen - self._began)}")


def _run(work: Work[T], display: StageBars | StageLines) -> T:
    while True:
        try:
            step = next(work)
        except StopIteration as end:
            display.end()
            result: T = end.value
            return result
        display.show(step)


def _describe_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
