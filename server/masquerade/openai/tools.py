"""The tools of a chat: which may be called, how often, and in which form the answer then is.

Knows OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`. Refuses to know how a model family writes calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from masquerade.engine import AnswerFormat, JsonFormat
from masquerade.model import Dialect, ToolCallParser
from masquerade.openai.schemas import ChatRequest, Function, NamedTool

MOST_CALLS = 16  # in one answer

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Toolbox:
    """The functions that one request offers."""

    dialect: Dialect
    functions: Sequence[Function]
    most: int  # calls in an answer
    forced: bool  # the answer must be calls
    marks: frozenset[int]  # special tokens that announce a call

    def make_reader(self) -> ToolCallParser:
        """Finds the calls in one answer."""
        return ToolCallParser(self.dialect, {function.name for function in self.functions}, self.most)

    def form(self, wanted: JsonFormat | None) -> AnswerFormat | None:
        """What the answer must be; `wanted` is the JSON that it must be if it is no call.

        A forced call always fits its function. One that the model chooses to make is held to it where the function is
        `strict`, or where the rest of the answer has a form, too.
        """
        held = self.forced or wanted is not None
        if not held and not any(function.strict for function in self.functions):
            return None
        frames = []
        for number, function in enumerate(self.functions):
            schema: dict[str, Any] = function.parameters or _NOTHING
            if not held and not function.strict:
                schema = {"type": "object"}
            frames.append(JsonFormat(schema, f"tools.{number}.function.parameters", *self.dialect.frame(function.name)))
        if not held:
            return AnswerFormat(frames, free_text=True, trigger=self.dialect.begin)
        most = 1 if self.dialect.single_call else self.most
        return AnswerFormat(frames, most, self.dialect.space, None if self.forced else wanted)


def open_toolbox(asked: ChatRequest, dialect: Dialect, tokenizer: Any) -> Toolbox | None:
    """The tools of a request; none if it has none, or may use none."""
    if not asked.tools or asked.tool_choice == "none":
        return None
    functions = [tool.function for tool in asked.tools]
    if isinstance(asked.tool_choice, NamedTool):
        functions = [function for function in functions if function.name == asked.tool_choice.function.name]
    forced = asked.tool_choice not in (None, "auto")
    named = isinstance(asked.tool_choice, NamedTool)
    most = 1 if named or asked.parallel_tool_calls is False else MOST_CALLS
    added = tokenizer.added_tokens_decoder
    marks = frozenset(token for token, known in added.items() if known.special and known.content in dialect.triggers)
    return Toolbox(dialect, functions, most, forced, marks)
