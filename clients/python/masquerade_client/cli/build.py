"""`masq build`: upload examples, follow the build, print the certificate."""

from __future__ import annotations

import json
import sys
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
    with Client(url, key) as client, _bars() as bars:
        upload = bars.add_task("upload", total=data.stat().st_size)
        build = client.builds.create(
            name, data, sent=lambda done, size: bars.update(upload, completed=done, total=size), **options
        )
        build = _follow(client, build, bars) if wait else build
        made = [client.personas.get(one.persona) for one in build.made]
    if as_json:
        print(json.dumps(asdict(build)))
    elif not wait:
        print(build.id)
    for persona in () if as_json else made:
        Console().print(describe(persona))


def _follow(client: Client, build: Build, bars: Progress) -> Build:
    """Show a bar for each stage until the build ends. Ctrl-C cancels the build."""
    stages: dict[str, TaskID] = {}

    def show(event: BuildEvent) -> None:
        if event.stage is None:
            bars.console.print(event.message, markup=False, highlight=False)
            return
        if event.stage not in stages:
            stages[event.stage] = bars.add_task(event.stage, total=event.total)
        bars.update(stages[event.stage], completed=event.done, total=event.total)

    try:
        ended = client.builds.wait(build.id, show)
    except KeyboardInterrupt:
        client.builds.cancel(build.id)
        bars.console.print(f"the build of {build.persona!r} was cancelled", markup=False, highlight=False)
        sys.exit(130)
    for stage in stages.values():
        bars.update(stage, total=bars.tasks[stage].completed)
    return ended


class Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """The rate as text, empty while it is unknown."""
        return Text(f"{task.speed:,.1f}/s" if task.speed else "", style="dim")


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr))
