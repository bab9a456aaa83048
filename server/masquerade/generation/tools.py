"""The tools of a chat: `tools`, `tool_choice` and `parallel_tool_calls`, and the answer format that they require."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from masquerade.engine import AnswerFormat, JsonFormat
from masquerade.generation.messages import Function, NamedTool
from masquerade.generation.requests import ChatRequest
from masquerade.model import Dialect, ToolCallParser

MAX_CALLS = 16  # in one answer

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolSet:
    """The functions that the model may call in the answer to one request."""

    dialect: Dialect
    functions: Sequence[Function]
    max_calls: int  # in one answer
    required: bool  # the answer must be calls
    trigger_ids: frozenset[int]  # special tokens that begin a call

    def make_parser(self) -> ToolCallParser:
        """A parser of the calls in one answer."""
        return ToolCallParser(self.dialect, {function.name for function in self.functions}, self.max_calls)

    def answer_format(self, json_format: JsonFormat | None) -> AnswerFormat | None:
        """The format of the answer, given the format that an answer without calls must have; None for free text.

        The arguments of a required call always match the schema of its function. Those of an optional call match it
        if the function is `strict`, or if `json_format` is given.
        """
        constrained = self.required or json_format is not None
        if not constrained and not any(function.strict for function in self.functions):
            return None
        calls = []
        for number, function in enumerate(self.functions):
            schema: dict[str, Any] = function.parameters or _NO_PARAMETERS
            if not constrained and not function.strict:
                schema = {"type": "object"}
            calls.append(JsonFormat(schema, f"tools.{number}.function.parameters", *self.dialect.frame(function.name)))
        if not constrained:
            return AnswerFormat(calls, free_text=True, trigger=self.dialect.begin)
        max_count = 1 if self.dialect.single_call else self.max_calls
        return AnswerFormat(calls, max_count, self.dialect.space, None if self.required else json_format)


def select_tools(request: ChatRequest, dialect: Dialect, tokenizer: Any) -> ToolSet | None:
    """The tools that the model may call; None if there are none, or `tool_choice` is `none`."""
    if not request.tools or request.tool_choice == "none":
        return None
    functions = [tool.function for tool in request.tools]
    named = isinstance(request.tool_choice, NamedTool)
    if isinstance(request.tool_choice, NamedTool):
        functions = [function for function in functions if function.name == request.tool_choice.function.name]
    max_calls = 1 if named or request.parallel_tool_calls is False else MAX_CALLS
    required = request.tool_choice not in (None, "auto")
    added = tokenizer.added_tokens_decoder
    triggers = frozenset(token for token, known in added.items() if known.special and known.content in dialect.triggers)
    return ToolSet(dialect, functions, max_calls, required, triggers)
