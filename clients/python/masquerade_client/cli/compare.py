"""`masq compare`: the answers of several personas to one question, side by side."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from masquerade_client import ChatOptions, Client, Message
from masquerade_client.cli.options import (
    BASE,
    DEFAULT_URL,
    AsJson,
    Gamma,
    Key,
    MaxTokens,
    Seed,
    Temperature,
    Url,
    check_question,
    complete_persona,
    plain,
)

MAX_PERSONAS = 4


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            help="Two to four personas (`base` for none), then the question.", autocompletion=complete_persona
        ),
    ],
    gamma: Gamma = None,
    temperature: Temperature = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Ask several personas one question: masq compare A B "How are you?"."""
    *names, prompt = words
    check_question(prompt)
    options: ChatOptions = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
    messages = [{"role": "user", "content": prompt}]
    with Client(url, key) as client:
        if as_json:
            _check(names)
            replies = [client.chat(messages, **_options_for(name, gamma, options)) for name in names]
            print(json.dumps({"replies": [asdict(reply) for reply in replies]}))
        else:
            show_side_by_side(client, names, messages, options, gamma)


def show_side_by_side(
    client: Client,
    names: Sequence[str],
    messages: Sequence[Message],
    options: ChatOptions,
    gamma: float | None = None,
) -> None:
    """Stream all answers concurrently. Raises the first error after all have ended."""
    _check(names)
    texts = ["" for _ in names]
    errors: list[Exception | None] = [None for _ in names]
    changed, interrupted = threading.Event(), threading.Event()

    def receive(column: int) -> None:
        try:
            with client.stream(messages, **_options_for(names[column], gamma, options)) as stream:
                for delta in stream:
                    if interrupted.is_set():
                        return
                    texts[column] += delta.text
                    changed.set()
        except Exception as error:
            errors[column] = error

    # Daemons, for which the end of the process does not wait: a read that has begun cannot be interrupted.
    threads = [threading.Thread(target=receive, args=(column,), daemon=True) for column in range(len(names))]
    try:
        for thread in threads:
            thread.start()
        if sys.stdout.isatty():
            with Live(_draw(names, texts), console=Console(), refresh_per_second=15) as live:
                while any(thread.is_alive() for thread in threads):
                    changed.wait(0.1)
                    changed.clear()
                    live.update(_draw(names, texts))
                live.update(_draw(names, texts))
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        interrupted.set()  # in a conversation, which goes on, each answer ends at its next token
        raise
    for error in filter(None, errors):
        raise error
    if not sys.stdout.isatty():
        for name, text in zip(names, texts, strict=True):
            print(f"{name}: {text}")


def _draw(names: Sequence[str], texts: Sequence[str]) -> Table:
    table = Table(*(Column(Text(name), ratio=1) for name in names), expand=True)
    table.add_row(*(Text(plain(text)) for text in texts))
    return table


def _check(names: Sequence[str]) -> None:
    if not 2 <= len(names) <= MAX_PERSONAS:
        raise typer.BadParameter(f"give two to {MAX_PERSONAS} personas and a question; there are {len(names)} personas")


def _options_for(name: str, gamma: float | None, options: ChatOptions) -> ChatOptions:
    return options if name == BASE else {**options, "persona": name, "gamma": gamma}
