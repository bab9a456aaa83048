"""The syntax of tool calls in each model family, and a streaming parser that finds calls in generated text.

| dialect | recognised in the chat template by | a call |
|---|---|---|
| hermes (Hermes 2 and 3, Qwen 2.5 and 3) | `<tool_call>` | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
| llama (Llama 3.1 to 3.3) | `<|python_tag|>` or its wording | the whole text: `{"name": ..., "parameters": {...}}` |
| generic | none of these | as hermes; a system message explains it |

transformers' `ResponseParser` (5.23) is no substitute: it needs a `response_template`, which these families' tokenizers
lack, streams a call's JSON without telling name from arguments, and raises for malformed calls instead of passing them
on as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

PYTHON_TAG = "<|python_tag|>"
_HEAD = re.compile(  # a call's object up to its arguments, with keys in the usual order
    r'\s*{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?={)'
)


@dataclass(frozen=True)
class Dialect:
    """The syntax of one model family's calls. `begin` and `end` enclose the JSON object of a call."""

    name: str
    begin: str = "<tool_call>"
    end: str = "</tool_call>"
    space: str = "\n"  # between `begin`, the object, `end` and the next call
    arguments: str = "arguments"  # the key of the arguments
    triggers: tuple[str, ...] = ()  # tokens that announce a call; if they are special, the text does not have them
    native: bool = True  # the chat template itself renders functions, calls and results
    single_call: bool = False  # the chat template renders at most one call per message

    def frame(self, name: str) -> tuple[str, str]:
        """The text before and after the arguments of a function's call."""
        opening = f'{self.begin}{self.space}{{"name": {json.dumps(name)}, "{self.arguments}": '
        return opening, f"}}{self.space}{self.end}"


HERMES = Dialect("hermes", triggers=("<tool_call>",))
LLAMA = Dialect("llama", "", "", "", "parameters", triggers=(PYTHON_TAG,), single_call=True)
GENERIC = Dialect("generic", triggers=("<tool_call>",), native=False)


def find_dialect(tokenizer: Any) -> Dialect:
    """The dialect of a tokenizer's chat template."""
    if not tokenizer.chat_template:
        return GENERIC
    template = tokenizer.get_chat_template(tools=[{}])
    if not re.search(r"\btools\b", template):
        return GENERIC
    if "<tool_call>" in template:
        return GENERIC if "<function=" in template else HERMES  # calls written as XML are not supported
    return LLAMA if PYTHON_TAG in template or '"parameters": dictionary' in template else GENERIC


class CallStart(NamedTuple):
    """A call of a function starts."""

    name: str


class ArgumentsDelta(NamedTuple):
    """More JSON text of the arguments of the call that started last."""

    text: str


ResponsePart = str | CallStart | ArgumentsDelta  # a str is content


class ToolCallParser:
    """Separates the tool calls in one generated answer from its content, incrementally.

    Only offered functions can be called: what looks like a call of another one is content.
    """

    def __init__(self, dialect: Dialect, names: Collection[str], max_calls: int) -> None:
        """Text after `max_calls` calls is discarded."""
        self._dialect = dialect
        self._names = names
        self._left = self._max_calls = max_calls
        self._buffer = ""  # not parsed yet
        self._raw = ""  # removed from the buffer since a possible call began
        self._state: Callable[[], Iterator[ResponsePart]] = self._content if dialect.begin else self._call

    def push(self, text: str, *, triggered: bool = False) -> list[ResponsePart]:
        """Parse more text; `triggered` if a special token before it announced a call."""
        if triggered and self._left:
            self._state = self._call
        self._buffer += text
        parts: list[ResponsePart] = []
        while True:
            state, size = self._state, len(self._buffer)
            parts += state()
            if self._state == state and len(self._buffer) == size:
                return parts

    def flush(self) -> list[ResponsePart]:
        """End the answer: a call whose name is incomplete is content."""
        unnamed = self._state in (self._content, self._call, self._name)
        rest, self._buffer, self._raw = self._raw + self._buffer if unnamed else "", "", ""
        return [rest] if rest.strip() or (rest and self._left == self._max_calls) else []

    def _content(self) -> Iterator[ResponsePart]:
        """State: content, up to where a call may begin. White space before a call is dropped."""
        begin = self._dialect.begin
        content, tag, rest = self._buffer.partition(begin) if begin else (self._buffer, "", "")
        if tag:
            content, self._buffer = content.rstrip(), rest
            self._begin_call(tag)
        elif begin:
            partial = next((size for size in range(len(begin) - 1, 0, -1) if content.endswith(begin[:size])), 0)
            content = content[: len(content) - partial].rstrip()
            self._buffer = self._buffer[len(content) :]
        else:
            self._buffer = ""
        if content:
            yield content

    def _call(self) -> Iterator[ResponsePart]:
        """State: a call is expected without `begin`. A JSON object starts one; anything else is content."""
        text = self._buffer.lstrip(" \t\r\n;").removeprefix(PYTHON_TAG)
        if text.startswith("{"):
            self._buffer = text
            self._begin_call("")
        elif text and not PYTHON_TAG.startswith(text):
            self._state = self._content
        return iter(())

    def _begin_call(self, raw: str) -> None:
        self._raw, self._braces, self._scanned, self._state = raw, _Braces(), 0, self._name

    def _name(self) -> Iterator[ResponsePart]:
        """State: a call's object before its arguments. With keys in another order it is parsed when it is complete."""
        head = _HEAD.match(self._buffer)
        if head and head[1] in self._names:
            self._buffer, self._braces, self._state = self._buffer[head.end() :], _Braces(), self._arguments
            yield CallStart(head[1])
        elif head or not "{".startswith(self._buffer.lstrip()[:1]):
            yield from self._reject()
        elif (end := self._braces.find_end(self._buffer[self._scanned :])) is None:
            self._scanned = len(self._buffer)
        elif call := _parse_call(self._buffer[: self._scanned + end], self._names):
            self._buffer = self._buffer[self._scanned + end - 1 :]
            self._end_call()
            yield from call
        else:
            yield from self._reject()

    def _reject(self) -> Iterator[ResponsePart]:
        """Turn what looked like a call into content."""
        raw, self._raw, self._state = self._raw, "", self._content
        if raw:
            yield raw

    def _arguments(self) -> Iterator[ResponsePart]:
        """State: inside the arguments."""
        text, end = self._buffer, self._braces.find_end(self._buffer)
        self._buffer = ""
        if end is not None:
            text, self._buffer = text[:end], text[end:]
            self._end_call()
        if text:
            yield ArgumentsDelta(text)

    def _end_call(self) -> None:
        self._left -= 1
        self._raw = ""
        self._tail, self._state = "}" + self._dialect.end, self._after_arguments

    def _after_arguments(self) -> Iterator[ResponsePart]:
        """State: the object's closing brace and the dialect's `end`, as far as they are there."""
        while self._buffer and self._tail:
            if self._buffer[0] == self._tail[0]:
                self._tail = self._tail[1:]
            elif not self._buffer[0].isspace():
                self._tail = ""
                break
            self._buffer = self._buffer[1:]
        if not self._tail:
            following = self._content if self._dialect.begin else self._call
            self._state = following if self._left else self._discard
        return iter(())

    def _discard(self) -> Iterator[ResponsePart]:
        """State: no more calls are allowed."""
        self._buffer = ""
        return iter(())


class _Braces:
    """Finds the end of a JSON object in streamed text."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def find_end(self, text: str) -> int | None:
        """The position in the next piece of text after the object's closing brace, or None if it is not there."""
        for position, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character == "{":
                self._depth += 1
            elif character == "}":
                self._depth -= 1
                if not self._depth:
                    return position + 1
        return None


def _parse_call(text: str, names: Collection[str]) -> list[ResponsePart]:
    """The call in a complete JSON object; empty if it is not a call of an offered function."""
    try:
        call = json.loads(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return []
    name = call.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return []
    written = json.dumps(arguments, ensure_ascii=False)
    try:
        written.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        written = json.dumps(arguments)
    return [CallStart(name), ArgumentsDelta(written)]
