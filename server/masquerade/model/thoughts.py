"""The thoughts of reasoning models: what they write between `<think>` and `</think>` before the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

THOUGHTS_BEGIN, THOUGHTS_END = "<think>", "</think>"
_TAIL = 32  # tokens at the end of a prompt that show whether thoughts have begun

ThoughtStart = Literal["begun", "optional"]  # by the prompt; or by the answer, if it begins with `THOUGHTS_BEGIN`


def find_thought_start(tokenizer: Any, prompt: Sequence[int], continued: str | None = None) -> ThoughtStart | None:
    """How thoughts start in the answer to a prompt. None if the chat template knows none, or if they have ended.

    `continued` is the assistant's message that the answer continues.
    """
    if not tokenizer.chat_template or THOUGHTS_END not in tokenizer.get_chat_template(tools=[]):
        return None
    if continued is not None:
        return "begun" if continued.rfind(THOUGHTS_BEGIN) > continued.rfind(THOUGHTS_END) else None
    tail = tokenizer.decode(prompt[-_TAIL:]).rstrip()
    if tail.endswith(THOUGHTS_END):
        return None
    return "begun" if tail.endswith(THOUGHTS_BEGIN) else "optional"


class ThoughtParser:
    """Separates the thoughts of one generated answer from the rest, incrementally. White space around both is dropped.

    An answer has thoughts once, at its start.
    """

    def __init__(self, start: ThoughtStart) -> None:
        self._buffer = ""  # not parsed yet
        self._begun = start == "begun"
        self._ended = False
        self._thought = self._content = False  # whether there is any yet

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Parse more text: what it adds to the thoughts, and to the content. `last` ends the answer."""
        self._buffer += text
        if not self._begun and not self._find_begin(last):
            return "", ""
        thought = "" if self._ended else self._take_thought(last)
        return thought, self._take_content() if self._ended else ""

    def _find_begin(self, last: bool) -> bool:
        """Whether it is decided how the answer begins."""
        start = self._buffer.lstrip()
        if start.startswith(THOUGHTS_BEGIN):
            self._buffer = start.removeprefix(THOUGHTS_BEGIN)
        elif THOUGHTS_BEGIN.startswith(start) and not last:
            return False
        else:
            self._ended = self._content = True  # without thoughts, white space is content
        self._begun = True
        return True

    def _take_thought(self, last: bool) -> str:
        thought, end, rest = self._buffer.partition(THOUGHTS_END)
        self._ended = bool(end)
        if not end and not last:  # the end of the buffer may be the start of `THOUGHTS_END`, or white space before it
            partial = next(
                (size for size in range(len(THOUGHTS_END) - 1, 0, -1) if thought.endswith(THOUGHTS_END[:size])), 0
            )
            kept = thought[: len(thought) - partial].rstrip()
            thought, rest = kept, thought[len(kept) :]
        self._buffer = rest
        thought = thought.rstrip() if end or last else thought
        if not self._thought:
            thought = thought.lstrip()
        self._thought |= bool(thought)
        return thought

    def _take_content(self) -> str:
        content, self._buffer = self._buffer if self._content else self._buffer.lstrip(), ""
        self._content |= bool(content)
        return content
