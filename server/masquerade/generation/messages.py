"""Messages and tools of a chat, as clients send them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from masquerade.errors import InvalidValue, UnsupportedParameter
from masquerade.generation import unsupported
from masquerade.http.bodies import NotJson, Size, check_size, count, parse
from masquerade.http.wire import Refusal, RequestBody, Schema, Text

MAX_MESSAGES = 2048  # in one chat
MAX_TOOLS = 128
MAX_PAST_CALLS = 2048  # in all messages of a chat

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]

_REQUEST_FIELDS = ("persona", "gamma", "persona_phase")


class TextPart(Schema):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Function(Schema):
    """A function that the model may call; without `parameters` it takes none."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """A tool that the model may use: a function."""

    type: Literal["function"]
    function: Function


class FunctionReference(Schema):
    """A function by its name."""

    name: FunctionName


class NamedTool(Schema):
    """The tool that the model must use."""

    type: Literal["function"]
    function: FunctionReference


def choose_tool(name: str) -> NamedTool:
    """The choice of a function."""
    return NamedTool(type="function", function=FunctionReference(name=name))


def define_tool(name: str, description: str | None, parameters: dict[str, Any] | None, *, strict: bool | None) -> Tool:
    """The tool that is a function."""
    function = Function(name=name, description=description, parameters=parameters, strict=strict)
    return Tool(type="function", function=function)


class CalledFunction(Schema):
    """The function of a call; `arguments` is JSON as text."""

    name: Text
    arguments: Text

    @cached_property
    def value(self) -> Any:
        """The parsed arguments, or their text if it is not JSON. Raises `InvalidValue` as `bodies.parse` does."""
        try:
            return parse(self.arguments, "the text in `arguments`", "arguments")
        except NotJson:
            return self.arguments


class ToolCall(Schema):
    """A call that the model made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it: the arguments are an object, unless they are not JSON."""
        called = {"name": self.function.name, "arguments": self.function.value}
        return {"id": self.id, "type": self.type, "function": called}


def record_call(call_id: str, name: str, arguments: str) -> ToolCall:
    """The call of a function; `arguments` is JSON as text."""
    return ToolCall(id=call_id, function=CalledFunction(name=name, arguments=arguments))


class Message(RequestBody):
    """One message of a chat. `content` may be null in an assistant's message with `tool_calls` or thoughts only."""

    refused = unsupported.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)] | None = None
    reasoning_content: Text | None = None  # an assistant's thoughts, which some templates write
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_misplaced(cls, fields: Any) -> Any:
        given = fields if isinstance(fields, dict) else {}
        misplaced = next((name for name in _REQUEST_FIELDS if given.get(name) is not None), None)
        if misplaced:
            raise Refusal(
                UnsupportedParameter(
                    f"a message cannot have `{misplaced}`: a request has one persona, which applies to all messages; "
                    "to change it, send the history again with another `persona`",
                    param=misplaced,
                )
            )
        parts = given.get("content")
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                param = f"content.{number}.type"
                raise Refusal(UnsupportedParameter(f"parts of the type {kind!r:.40} are not supported", param=param))
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        says_otherwise = bool(self.tool_calls) or self.reasoning_content is not None
        if self.content is None and not (self.role == "assistant" and says_otherwise):
            raise Refusal(InvalidValue("a message needs `content`, a string or a list of parts", param="content"))
        if self.tool_calls and self.role != "assistant":
            raise Refusal(InvalidValue("only an assistant's message has `tool_calls`", param="tool_calls"))
        if self.role == "tool" and self.tool_call_id is None:
            raise Refusal(InvalidValue("a tool's message needs `tool_call_id`", param="tool_call_id"))
        return self

    def texts(self) -> Iterator[str]:
        """Every text of the message, including thoughts, and names and arguments of calls."""
        if self.reasoning_content is not None:
            yield self.reasoning_content
        if isinstance(self.content, str):
            yield self.content
        else:
            yield from (part.text for part in self.content or ())
        for call in self.tool_calls or ():
            yield from (call.function.name, call.function.arguments)

    def plain(self) -> dict[str, Any]:
        """As chat templates expect it: text only, calls as objects, and `developer` is `system`."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _check_arguments(messages: list[Message]) -> list[Message]:
    """Refuse arguments of calls that have too many values together, or are nested too deeply."""
    calls = [
        (f"{number}.tool_calls.{place}", call.function)
        for number, message in enumerate(messages)
        for place, call in enumerate(message.tool_calls or ())
    ]
    if len(calls) > MAX_PAST_CALLS:
        raise ValueError(f"they have {len(calls)} `tool_calls`; the limit is {MAX_PAST_CALLS}")
    size = Size(0, 0, 0)
    for place, function in calls:
        try:
            size = size.plus(count(function.arguments))
            check_size(size, "what the calls have in `arguments`, together,", None)
            function.value  # noqa: B018 - parses the arguments; the property caches them
        except InvalidValue as error:
            error.param = f"{place}.function.arguments"
            raise Refusal(error) from None
    return messages


Messages = Annotated[
    list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_arguments)
]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]
