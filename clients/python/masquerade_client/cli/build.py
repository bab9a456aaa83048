"""`masq build`: upload examples, follow the build, print the certificate."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from masquerade_client import Build, BuildEvent, BuildOptions, Client
from masquerade_client.cli.options import DEFAULT_URL, AsJson, Key, Url
from masquerade_client.cli.personas import describe

LINE_SECONDS = 10.0  # least time between two lines about one stage
Jsonl = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Examples, one JSON object per line.")]


def build(
    data: Jsonl,
    name: Annotated[str, typer.Option(help="Name of the persona.")],
    contrast: Annotated[Path | None, typer.Option(exists=True, help="Examples of the opposite.")] = None,
    contrast_name: Annotated[str | None, typer.Option(help="Also publish the opposite, under this name.")] = None,
    neutral: Annotated[Path | None, typer.Option(exists=True, help="Examples that should not change.")] = None,
    validation: Annotated[Path | None, typer.Option(exists=True, help="Held-out examples.")] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="The base answers the questions in DATA under this prompt.")
    ] = None,
    contrast_prompt: Annotated[str | None, typer.Option(help="System prompt of the contrast.")] = None,
    card: Annotated[Path | None, typer.Option(exists=True, help="A character card instead of a system prompt.")] = None,
    strength: Annotated[
        Literal["gentle", "normal", "strong"] | None,
        typer.Option(help="What the mask may cost on neutral text: 2 %, 5 % (the default) or 15 % of perplexity."),
    ] = None,
    score: Annotated[str | None, typer.Option(help="How weights are ranked; by default a search in steps.")] = None,
    rho: Annotated[str | None, typer.Option(help="Share of weights to prune, or `auto`.")] = None,
    structure: Annotated[
        Literal["weights", "channels"] | None, typer.Option(help="Prune single weights, or whole input channels.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="`all` or `decode`.")] = None,
    samples: Annotated[int | None, typer.Option(help="Maximum number of examples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Publish a mask that fails the checks.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Make a new generation of an existing persona.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the build ends.")] = True,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Build a persona from examples, or from a system prompt and questions."""
    given: dict[str, Any] = {
        "contrast": contrast,
        "contrast_name": contrast_name,
        "neutral": neutral,
        "validation": validation,
        "system_prompt": system_prompt,
        "contrast_prompt": contrast_prompt,
        "card": card,
        "strength": strength,
        "score": score,
        "rho": rho,
        "structure": structure,
        "phase": phase,
        "samples": samples,
        "seed": seed,
        "force": force or None,
        "replace": replace or None,
    }
    options = cast(BuildOptions, {option: value for option, value in given.items() if value is not None})
    with Client(url, key) as client, _follow_stages() as stages:
        build = client.builds.create(name, data, sent=lambda done, size: stages.show("upload", done, size), **options)
        build = _follow(client, build, stages) if wait else build
        made = [client.personas.get(one.persona) for one in build.made]
    if as_json:
        print(json.dumps(asdict(build)))
    elif not wait:
        print(build.id)
    for persona in () if as_json else made:
        Console().print(describe(persona))


def _follow(client: Client, build: Build, stages: Bars | Lines) -> Build:
    """Show the stages of a build until it ends. Ctrl-C cancels the build."""

    def show(event: BuildEvent) -> None:
        if event.stage is None:
            stages.say(event.message)
        else:
            stages.show(event.stage, event.done or 0, event.total)

    try:
        ended = client.builds.wait(build.id, show)
    except KeyboardInterrupt:
        client.builds.cancel(build.id)
        stages.say(f"the build of {build.persona!r} was cancelled")
        sys.exit(130)
    stages.end()
    return ended


class Bars:
    """A progress bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stages: dict[str, TaskID] = {}

    def show(self, stage: str, done: int, total: int | None) -> None:
        """Move the bar of a stage."""
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._stages[stage], completed=done, total=total)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        """Complete the bars of stages whose total was unknown."""
        for stage in self._stages.values():
            self._progress.update(stage, total=self._progress.tasks[stage].completed)


class Lines:
    """A line for each new stage, and at most one each `LINE_SECONDS` within it."""

    def __init__(self) -> None:
        self._stage, self._written = "", 0.0

    def show(self, stage: str, done: int, total: int | None) -> None:
        """Write a line if the stage is new or the last line is old."""
        now = time.monotonic()
        if stage != self._stage or now - self._written >= LINE_SECONDS:
            self._stage, self._written = stage, now
            self.say(f"{stage}: {done}" + (f" of {total}" if total else ""))

    def say(self, text: str) -> None:
        """Write a line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Nothing is left to write."""


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """The rate as text, empty while it is unknown."""
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="dim")


@contextmanager
def _follow_stages() -> Iterator[Bars | Lines]:
    """Bars on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)
