"""Options that several commands share, before or after the command."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import typer

from masquerade_client import Client, MasqueradeError

_URL, _KEY = "MASQUERADE_URL", "MASQUERADE_KEY"
Url = Annotated[str, typer.Option(help=f"Address of the server; or {_URL}.")]
Key = Annotated[str | None, typer.Option(help=f"API key, if the server requires one; or {_KEY}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only one JSON object on stdout.")]
Gamma = Annotated[float | None, typer.Option(min=0, max=1, help="0 applies the full mask, 1 is the base.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy decoding.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
MaxTokens = Annotated[int | None, typer.Option(help="Maximum number of tokens of an answer.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]

DEFAULT_URL = "http://127.0.0.1:8000"
BASE = "base"  # stands for no persona; the server reserves the name


def share(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(envvar=_URL, help="Address of the server.")] = None,
    key: Annotated[str | None, typer.Option(envvar=_KEY, help="API key, if the server requires one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Chat with personas, compare them, build them. Options can be given before or after the command."""
    given = {"url": url, "key": key, "as_json": as_json or None}
    shared = {name: value for name, value in given.items() if value is not None}
    commands: Iterable[str] = getattr(context.command, "commands", ())
    context.default_map = dict.fromkeys(commands, shared)


def complete_persona(context: typer.Context, incomplete: str) -> list[str]:
    """Names for shell completion; none if the server does not respond within 2 seconds."""
    try:
        with Client(_find(context, "url") or DEFAULT_URL, _find(context, "key"), timeout=2.0, retries=0) as client:
            found = [model.persona for model in client.models()]
    except MasqueradeError:
        return []
    return [name for name in found if name and name.startswith(incomplete)]


def _find(context: typer.Context, option: str) -> str | None:
    """A shared option during completion: after the command, before it, or in the environment."""
    before: str | None = context.find_root().params.get(option)
    after: str | None = context.params.get(option)
    return before if before and after in {None, DEFAULT_URL} else after


def check_question(text: str) -> None:
    """Raise `typer.BadParameter` for a question without text."""
    if not text.strip():
        raise typer.BadParameter("there is no question; give one, or pipe one in")


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """Text without control characters, which could change the state of the terminal."""
    return _CONTROL.sub("", text)
