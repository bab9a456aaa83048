"""Options that several commands share, and the client that they mean."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

from masquerade_client import Client, MasqueradeError

Url = Annotated[str, typer.Option(envvar="MASQUERADE_URL", help="Where the server is.")]
Key = Annotated[str | None, typer.Option(envvar="MASQUERADE_KEY", help="Key, where the server wants one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Gamma = Annotated[float | None, typer.Option(min=0, max=1, help="0 wears the mask fully, 1 is the base.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
System = Annotated[str | None, typer.Option(help="A system prompt before everything.")]

DEFAULT_URL = "http://127.0.0.1:8000"


def connect(url: str, key: str | None) -> Client:
    """The client of a command."""
    return Client(url, key)


def complete_persona(context: typer.Context, incomplete: str) -> list[str]:
    """Names for a shell that completes one; none where the server does not say at once."""
    url = context.params.get("url") or os.environ.get("MASQUERADE_URL", DEFAULT_URL)
    key = context.params.get("key") or os.environ.get("MASQUERADE_KEY")
    try:
        with Client(url, key, timeout=2.0, retries=0) as client:
            found = [model.persona for model in client.models()]
    except MasqueradeError:
        return []
    return [name for name in found if name and name.startswith(incomplete)]


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """Text without what would steer a terminal: a model may say anything."""
    return _CONTROL.sub("", text)
