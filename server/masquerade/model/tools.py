"""How a base writes that it calls a function: the dialect of its family, recognised by its chat template.

Knows what a call looks like in text, and how to find calls in an answer while it grows. Refuses to know what functions
do, and which fields an API has for them.

| dialect | recognised by | a call |
|---|---|---|
| hermes (Hermes 2 and 3, Qwen 2.5 and 3) | `<tool_call>` | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
| llama (Llama 3.1 to 3.3) | `<|python_tag|>` or its wording | all of it: `{"name": ..., "parameters": {...}}` |
| generic | any other template, also one without tools | as hermes; a system message explains it |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

PYTHON_TAG = "<|python_tag|>"
_HEAD = re.compile(  # an object with its parts in the usual order, up to the arguments
    r'\s*{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?={)'
)


@dataclass(frozen=True)
class Dialect:
    """One way of writing calls. `begin` and `end` stand around the JSON object of a call."""

    name: str
    begin: str = "<tool_call>"
    end: str = "</tool_call>"
    space: str = "\n"  # between the object and what stands around it, and between calls
    arguments: str = "arguments"  # the key of the arguments
    marks: tuple[str, ...] = ()  # tokens that may announce a call, and are not part of the text if they are special
    native: bool = True  # the template itself describes functions, calls and results
    lonely: bool = False  # the template takes one call in a message

    def frame(self, name: str) -> tuple[str, str]:
        """What a call of a function begins and ends with; the arguments stand between."""
        opening = f'{self.begin}{self.space}{{"name": {json.dumps(name)}, "{self.arguments}": '
        return opening, f"}}{self.space}{self.end}"


HERMES = Dialect("hermes", marks=("<tool_call>",))
LLAMA = Dialect("llama", "", "", "", "parameters", marks=(PYTHON_TAG,), lonely=True)
GENERIC = Dialect("generic", marks=("<tool_call>",), native=False)


def find_dialect(tokenizer: Any) -> Dialect:
    """The dialect that a tokenizer's chat template asks for."""
    if not tokenizer.chat_template:
        return GENERIC
    template = tokenizer.get_chat_template(tools=[{}])
    if not re.search(r"\btools\b", template):
        return GENERIC
    if "<tool_call>" in template:
        return GENERIC if "<function=" in template else HERMES  # what writes calls as XML is not understood
    return LLAMA if PYTHON_TAG in template or '"parameters": dictionary' in template else GENERIC


class Opened(NamedTuple):
    """A call begins."""

    name: str


class Argued(NamedTuple):
    """More of the JSON text of the arguments of the call that was opened last."""

    text: str


Part = str | Opened | Argued  # a str is what the model says


class Reader:
    """Tells calls from talk in one answer. Only offered functions can be called; what looks like any other is talk."""

    def __init__(self, dialect: Dialect, names: Collection[str], most: int) -> None:
        """At most `most` calls are read; what comes after them is dropped."""
        self._dialect = dialect
        self._names = names
        self._left = self._most = most
        self._rest = ""  # not understood yet
        self._raw = ""  # what was taken from it since a call perhaps began
        self._read: Callable[[], Iterator[Part]] = self._talk if dialect.begin else self._wait

    def push(self, text: str, *, marked: bool = False) -> list[Part]:
        """What more text means; `marked` if a special token before the text announced a call."""
        if marked and self._left:
            self._read = self._wait
        self._rest += text
        parts: list[Part] = []
        while True:
            read, size = self._read, len(self._rest)
            parts += read()
            if self._read == read and len(self._rest) == size:
                return parts

    def flush(self) -> list[Part]:
        """The end of the answer: a call that was not even named is talk."""
        unnamed = self._read in (self._talk, self._wait, self._name)
        rest, self._rest, self._raw = self._raw + self._rest if unnamed else "", "", ""
        return [rest] if rest.strip() or (rest and self._left == self._most) else []

    def _talk(self) -> Iterator[Part]:
        """Words, up to where a call may begin; the white space before it is the call's."""
        begin = self._dialect.begin
        said, tag, rest = self._rest.partition(begin) if begin else (self._rest, "", "")
        if tag:
            said, self._rest = said.rstrip(), rest
            self._expect(tag)
        elif begin:
            held = next((size for size in range(len(begin) - 1, 0, -1) if said.endswith(begin[:size])), 0)
            said = said[: len(said) - held].rstrip()
            self._rest = self._rest[len(said) :]
        else:
            self._rest = ""
        if said:
            yield said

    def _wait(self) -> Iterator[Part]:
        """Where nothing but a call is looked for: an object is one, anything else is talk."""
        text = self._rest.lstrip(" \t\r\n;").removeprefix(PYTHON_TAG)
        if text.startswith("{"):
            self._rest = text
            self._expect("")
        elif text and not PYTHON_TAG.startswith(text):
            self._read = self._talk
        return iter(())

    def _expect(self, raw: str) -> None:
        self._raw, self._braces, self._scanned, self._read = raw, _Braces(), 0, self._name

    def _name(self) -> Iterator[Part]:
        """The object of a call up to its arguments. In another order than usual, it is read when it is whole."""
        head = _HEAD.match(self._rest)
        if head and head[1] in self._names:
            self._rest, self._braces, self._read = self._rest[head.end() :], _Braces(), self._argue
            yield Opened(head[1])
        elif head or not "{".startswith(self._rest.lstrip()[:1]):
            yield from self._give_back()
        elif (end := self._braces.read(self._rest[self._scanned :])) is None:
            self._scanned = len(self._rest)
        elif call := _read_call(self._rest[: self._scanned + end], self._names):
            self._rest = self._rest[self._scanned + end - 1 :]
            self._end_call()
            yield from call
        else:
            yield from self._give_back()

    def _give_back(self) -> Iterator[Part]:
        """It was no call."""
        raw, self._raw, self._read = self._raw, "", self._talk
        if raw:
            yield raw

    def _argue(self) -> Iterator[Part]:
        """The arguments, as they come."""
        text, end = self._rest, self._braces.read(self._rest)
        self._rest = ""
        if end is not None:
            text, self._rest = text[:end], text[end:]
            self._end_call()
        if text:
            yield Argued(text)

    def _end_call(self) -> None:
        self._left -= 1
        self._raw = ""
        self._tail, self._read = "}" + self._dialect.end, self._close

    def _close(self) -> Iterator[Part]:
        """What follows the arguments, as far as it is there: the object's brace and the dialect's end."""
        while self._rest and self._tail:
            if self._rest[0] == self._tail[0]:
                self._tail = self._tail[1:]
            elif not self._rest[0].isspace():
                self._tail = ""
                break
            self._rest = self._rest[1:]
        if not self._tail:
            again = self._talk if self._dialect.begin else self._wait
            self._read = again if self._left else self._drop
        return iter(())

    def _drop(self) -> Iterator[Part]:
        self._rest = ""
        return iter(())


class _Braces:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def read(self, text: str) -> int | None:
        """The place after the object's last brace, if it is in this piece."""
        for place, character in enumerate(text):
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
                    return place + 1
        return None


def _read_call(text: str, names: Collection[str]) -> list[Part]:
    """The call that a whole JSON object is; none if it is none."""
    try:
        call = json.loads(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except ValueError:
        return []
    name = call.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return []
    return [Opened(name), Argued(json.dumps(arguments, ensure_ascii=False))]
