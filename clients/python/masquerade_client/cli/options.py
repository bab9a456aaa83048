"""Options that several commands share, before or after the command, and the client that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import typer

from masquerade_client import Client, MasqueradeError

_URL, _KEY = "MASQUERADE_URL", "MASQUERADE_KEY"
Url = Annotated[str, typer.Option(help=f"Where the server is; or {_URL}.")]
Key = Annotated[str | None, typer.Option(help=f"Key, where the server wants one; or {_KEY}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Gamma = Annotated[float | None, typer.Option(min=0, max=1, help="0 wears the mask fully, 1 is the base.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
System = Annotated[str | None, typer.Option(help="A system prompt before everything.")]

DEFAULT_URL = "http://127.0.0.1:8000"


def share(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(envvar=_URL, help="Where the server is.")] = None,
    key: Annotated[str | None, typer.Option(envvar=_KEY, help="Key, where the server wants one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Chat with personas, compare them, build them. Options may stand before the command or after it."""
    given = {"url": url, "key": key, "as_json": as_json or None}
    shared = {name: value for name, value in given.items() if value is not None}
    commands: Iterable[str] = getattr(context.command, "commands", ())
    context.default_map = dict.fromkeys(commands, shared)


def connect(url: str, key: str | None) -> Client:
    """The client of a command."""
    return Client(url, key)


def complete_persona(context: typer.Context, incomplete: str) -> list[str]:
    """Names for a shell that completes one; none where the server does not say at once."""
    try:
        with Client(_find(context, "url") or DEFAULT_URL, _find(context, "key"), timeout=2.0, retries=0) as client:
            found = [model.persona for model in client.models()]
    except MasqueradeError:
        return []
    return [name for name in found if name and name.startswith(incomplete)]


def _find(context: typer.Context, option: str) -> str | None:
    """A shared option of a line that is not run: after the command, before it, or in the environment."""
    before: str | None = context.find_root().params.get(option)
    after: str | None = context.params.get(option)
    return before if before and after in {None, DEFAULT_URL} else after


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """Text without what would steer a terminal: a model may say anything."""
    return _CONTROL.sub("", text)
