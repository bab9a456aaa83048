"""`masq chat`: one answer, or a conversation with slash commands and a history."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from masquerade_client import ChatOptions, Client, MasqueradeError
from masquerade_client.cli.compare import show_side_by_side
from masquerade_client.cli.options import (
    BASE,
    DEFAULT_URL,
    AsJson,
    Gamma,
    Key,
    MaxTokens,
    Seed,
    System,
    Temperature,
    Url,
    check_question,
    complete_persona,
    plain,
)

HELP = """\
/persona NAME    use another persona; `base`, or no name, for none
/gamma X         0 applies the full mask, 1 is the base; without a number, the persona's default
/compare A B     answer the last question with two to four personas side by side
/retry           answer the last question again
/clear           start a new conversation
/help  /quit
A backslash at the end of a line continues it; Ctrl-C interrupts an answer, Ctrl-D quits."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="The question; without it, a conversation, or stdin if it is piped.")
    ] = None,
    persona: Annotated[
        str | None,
        typer.Option("-p", "--persona", help="Persona that answers; `base` for none.", autocompletion=complete_persona),
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
    with Client(url, key) as client:
        messages = [{"role": "system", "content": system}] if system else []
        conversation = Conversation(client, options, None if persona == BASE else persona, gamma, messages)
        if prompt is None and sys.stdin and sys.stdin.isatty() and not as_json:
            return _run_conversation(conversation)
        asked = _read_input() if prompt is None else prompt
        check_question(asked)
        if as_json:
            print(json.dumps(asdict(client.chat(add_question(messages, asked), **conversation.options))))
        else:
            conversation.ask(asked)
    return None


def _read_input() -> str:
    try:
        return sys.stdin.buffer.read().decode() if sys.stdin else ""  # None if the caller closed it
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"the input is not UTF-8: {error}") from None


def add_question(messages: Sequence[dict[str, str]], text: str) -> list[dict[str, str]]:
    """The messages, and then a question of the user."""
    return [*messages, {"role": "user", "content": text}]


@dataclass
class Conversation:
    """The messages so far, and the options of the next answer."""

    client: Client
    sampling: ChatOptions
    persona: str | None
    gamma: float | None
    messages: list[dict[str, str]] = field(default_factory=list)
    before: list[dict[str, str]] = field(default_factory=list)  # the messages that the last question followed
    asked: str | None = None

    @property
    def options(self) -> ChatOptions:
        """The options of the next answer."""
        return {**self.sampling, "persona": self.persona, "gamma": self.gamma if self.persona else None}

    def ask(self, text: str) -> None:
        """Send a question, print the answer as it arrives, and keep both; Ctrl-C ends it early, as it is then."""
        self._answer(self.messages, text)

    def retry(self) -> None:
        """Answer the last question again; the answer that there is stays until there is another one."""
        if self.asked is not None:
            self._answer(self.before, self.asked)

    def _answer(self, before: list[dict[str, str]], text: str) -> None:
        self.before, self.asked = before, text
        shown = plain if sys.stdout.isatty() else str
        messages = add_question(before, text)
        with self.client.stream(messages, **self.options) as stream:
            try:
                for delta in stream:
                    print(shown(delta.text), end="", flush=True)
            finally:
                print(flush=True)
                if stream.text:
                    self.messages = [*messages, {"role": "assistant", "content": stream.text}]

    def clear(self) -> None:
        """Remove all messages except the system prompt."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.asked = None


def _run_conversation(conversation: Conversation) -> None:
    print("/help lists the commands.", file=sys.stderr)
    with _line_history():
        for text in _lines(conversation):
            try:
                _run_command(conversation, text) if text.startswith("/") else conversation.ask(text)
            except (MasqueradeError, ValueError, typer.BadParameter) as error:
                print(f"masq: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(file=sys.stderr)


def _lines(conversation: Conversation) -> Iterator[str]:
    """The lines that the user types, until the end of input or /quit."""
    while True:
        parts: list[str] = []
        try:
            while not parts or parts[-1].endswith("\\"):
                parts.append(input("… " if parts else f"{conversation.persona or 'base'}> "))
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


def _run_command(conversation: Conversation, text: str) -> None:
    name, _, rest = text[1:].partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        raise ValueError(f"there is no /{name}; /help lists the commands")
    command(conversation, rest.split())


def _set_persona(conversation: Conversation, words: list[str]) -> None:
    persona = words[0] if words and words[0] != BASE else None
    if persona is not None:
        conversation.client.personas.get(persona)  # raises NotFound now rather than at the next question
    conversation.persona = persona


def _set_gamma(conversation: Conversation, words: list[str]) -> None:
    gamma = float(words[0]) if words else None
    if gamma is not None and not 0 <= gamma <= 1:
        raise ValueError(f"gamma is between 0 and 1, not {gamma}")
    conversation.gamma = gamma


def _compare(conversation: Conversation, words: list[str]) -> None:
    if conversation.asked is None:
        raise ValueError("there is no question yet to compare answers to")
    messages = add_question(conversation.before, conversation.asked)
    show_side_by_side(conversation.client, words, messages, conversation.sampling)


_COMMANDS: dict[str, Callable[[Conversation, list[str]], Any]] = {
    "persona": _set_persona,
    "gamma": _set_gamma,
    "compare": _compare,
    "retry": lambda conversation, _: conversation.retry(),
    "clear": lambda conversation, _: conversation.clear(),
    "help": lambda *_: print(HELP),
}


@contextmanager
def _line_history() -> Iterator[None]:
    """Line editing with a persistent history, if the platform has readline."""
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
