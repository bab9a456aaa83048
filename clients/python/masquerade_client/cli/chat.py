"""`masq chat`: one answer, or a conversation.

Knows the terminal: lines, commands that begin with a slash, history. Refuses to know how answers come about.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from masquerade_client import ChatOptions, Client, MasqueradeError
from masquerade_client.cli.compare import show_side_by_side
from masquerade_client.cli.options import (
    DEFAULT_URL,
    AsJson,
    Gamma,
    Key,
    MaxTokens,
    Seed,
    System,
    Temperature,
    Url,
    complete_persona,
    connect,
    plain,
)

HELP = """\
/persona NAME    wear another persona; without a name, none
/gamma X         0 wears it fully, 1 is the base; without a number, the persona's own
/compare A B     ask the last question of two to four personas side by side
/retry           answer the last question again
/clear           begin anew
/help  /quit
A line that ends with a backslash goes on in the next one; Ctrl-C breaks an answer off, Ctrl-D leaves."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to say; without it, a conversation, or what is piped in.")
    ] = None,
    persona: Annotated[
        str | None, typer.Option("-p", "--persona", help="Persona to wear.", autocompletion=complete_persona)
    ] = None,
    gamma: Gamma = None,
    system: System = None,
    temperature: Temperature = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a persona."""
    options: ChatOptions = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
    with connect(url, key) as client:
        talk = Conversation(client, options, persona, gamma, [{"role": "system", "content": system}] if system else [])
        if prompt is None and sys.stdin.isatty() and not as_json:
            return _converse(talk)
        asked = sys.stdin.read() if prompt is None else prompt
        if as_json:
            print(json.dumps(asdict(client.chat(talk.with_question(asked), **talk.options))))
        else:
            talk.say(asked)
    return None


@dataclass
class Conversation:
    """What was said so far, and how the next answer is to be given."""

    client: Client
    sampling: ChatOptions
    persona: str | None
    gamma: float | None
    messages: list[dict[str, str]] = field(default_factory=list)
    asked: str | None = None

    @property
    def options(self) -> ChatOptions:
        """The options of the next answer."""
        return {**self.sampling, "persona": self.persona, "gamma": self.gamma if self.persona else None}

    def with_question(self, text: str) -> list[dict[str, str]]:
        """The messages that ask a question."""
        return [*self.messages, {"role": "user", "content": text}]

    def say(self, text: str) -> None:
        """Ask, print the answer as it comes, remember both. Ctrl-C keeps what has come."""
        self.asked = text
        shown = plain if sys.stdout.isatty() else str
        messages = self.with_question(text)
        with self.client.stream(messages, **self.options) as stream:
            with suppress(KeyboardInterrupt):
                for delta in stream:
                    print(shown(delta.text), end="", flush=True)
            print(flush=True)
            self.messages = [*messages, {"role": "assistant", "content": stream.text}]

    def retry(self) -> None:
        """Answer the last question again."""
        if self.asked is not None:
            self.messages = self.messages[:-2]
            self.say(self.asked)

    def clear(self) -> None:
        """Forget what was said, but not the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.asked = None


def _converse(talk: Conversation) -> None:
    print("/help says what else there is.", file=sys.stderr)
    with _remembering():
        for text in _lines(talk):
            try:
                _obey(talk, text) if text.startswith("/") else talk.say(text)
            except (MasqueradeError, ValueError) as error:
                print(f"masq: {error}", file=sys.stderr)


def _lines(talk: Conversation) -> Iterator[str]:
    """What is typed, until the end of it."""
    while True:
        parts: list[str] = []
        try:
            while not parts or parts[-1].endswith("\\"):
                parts.append(input("… " if parts else f"{talk.persona or 'base'}> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        text = "\n".join(part.removesuffix("\\") for part in parts).strip()
        if text == "/quit":
            return
        if text:
            yield text


def _obey(talk: Conversation, text: str) -> None:
    name, _, rest = text[1:].partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        raise ValueError(f"there is no /{name}; /help says what there is")
    command(talk, rest.split())


def _wear(talk: Conversation, words: list[str]) -> None:
    persona = words[0] if words else None
    if persona is not None:
        talk.client.personas.get(persona)  # says so now if there is none
    talk.persona = persona


def _set_gamma(talk: Conversation, words: list[str]) -> None:
    gamma = float(words[0]) if words else None
    if gamma is not None and not 0 <= gamma <= 1:
        raise ValueError(f"gamma is between 0 and 1, not {gamma}")
    talk.gamma = gamma


def _compare(talk: Conversation, words: list[str]) -> None:
    if talk.asked is None:
        raise ValueError("there is no question yet to compare answers to")
    before = talk.messages[:-2]
    show_side_by_side(talk.client, words, [*before, {"role": "user", "content": talk.asked}], talk.sampling)


_COMMANDS: dict[str, Callable[[Conversation, list[str]], Any]] = {
    "persona": _wear,
    "gamma": _set_gamma,
    "compare": _compare,
    "retry": lambda talk, _: talk.retry(),
    "clear": lambda talk, _: talk.clear(),
    "help": lambda *_: print(HELP),
}


@contextmanager
def _remembering() -> Iterator[None]:
    """Line editing with a history that outlives the command, where the platform has it."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "masquerade" / "history"
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)
            path.chmod(0o600)
