"""Bodies of Anthropic's requests, and the chats that they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from masquerade.engine import JsonFormat, Phase
from masquerade.errors import InvalidValue, UnsupportedParameter, quote
from masquerade.generation import unsupported
from masquerade.generation.messages import (
    MAX_MESSAGES,
    MAX_PAST_CALLS,
    MAX_TOOLS,
    FunctionName,
    Message,
    Tool,
    choose_tool,
    define_tool,
    record_call,
)
from masquerade.generation.requests import WITHIN_64_BITS, ChatRequest, Count, JsonSchema, SamplingSeed, SchemaFormat
from masquerade.http.wire import Refusal, RequestBody, Schema, Text, check_unicode, encode, show

MAX_SEQUENCES = 64  # stop sequences

_CHAT = (  # fields that chats have under the same names, with the same meaning
    *("model", "persona", "gamma", "persona_phase", "seed"),
    *("temperature", "top_p", "top_k", "max_tokens", "stream"),
)
REFUSED: unsupported.Table = {  # as `unsupported` has them for other requests
    **{name: () for name in ChatRequest.model_fields if name not in (*_CHAT, "messages", "tools", "tool_choice")},
    **{name: values for name, values in unsupported.CHAT.items() if name not in ("stop_sequences", "system")},
    **unsupported.TEMPLATE_FIELDS,
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "logprobs": (False,),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "stream_options": ({}, {"include_usage": False}, {"include_usage": True}),  # streams always have it
    # Anthropic's own
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
    "output_format": (),
    "thinking": ({"type": "disabled"},),
}

_EXAMPLE: dict[str, Any] = {
    "model": "demo:introvert",
    "messages": [{"role": "user", "content": "Would you like to come to a party?"}],
}


def _check_values(value: dict[str, Any]) -> dict[str, Any]:
    check_unicode(encode(value))
    return value


class TextBlock(Schema):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(Schema):
    """Thoughts of the model, which some chat templates write."""

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(Schema):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: Annotated[dict[str, Any], AfterValidator(_check_values)]


def _refuse_kinds(fields: Any, name: str, known: Sequence[str], noun: str = "blocks") -> Any:
    """The fields, unless an item of the list `name` has another type than the `known` ones."""
    items = fields.get(name) if isinstance(fields, dict) else None
    for number, item in enumerate(items if isinstance(items, list) else ()):
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in known:
            param = f"{name}.{number}.type"
            raise Refusal(UnsupportedParameter(f"{noun} of the type {kind!r:.40} are not supported", param=param))
    return fields


_Texts = Annotated[list[TextBlock], Field(fail_fast=True)]


class ToolResultBlock(Schema):
    """What a call returned; `is_error` is not shown to the model."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | _Texts | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, fields: Any) -> Any:
        return _refuse_kinds(fields, "content", ("text",))


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
_KINDS = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use"), "system": ("text",)}


class AnthropicMessage(RequestBody):
    """A message, or part of one: messages of one role that follow each other are one turn."""

    refused: ClassVar[unsupported.Table] = {"persona": (), "gamma": (), "persona_phase": ()}

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Annotated[Block, Field(discriminator="type")]], Field(fail_fast=True, min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, fields: Any) -> Any:
        return _refuse_kinds(fields, "content", ("text", "thinking", "tool_use", "tool_result"))

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        for number, block in enumerate(self.blocks()):
            if block.type not in _KINDS[self.role]:
                text = f"a message of the role {self.role!r} cannot have blocks of the type {block.type!r}"
                raise Refusal(InvalidValue(text, param=f"content.{number}.type"))
        return self

    def blocks(self) -> Sequence[Block]:
        """The content, where a string is one block of text."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class AnthropicTool(RequestBody):
    """A tool that the client runs."""

    refused: ClassVar[unsupported.Table] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }

    name: FunctionName
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnthropicToolChoice(Schema):
    """Whether the model calls a tool: as it likes, any of them, the one of `name`, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None  # with `tool`
    disable_parallel_tool_use: bool | None = None


class AnthropicFormat(Schema):
    """JSON of a schema."""

    type: Literal["json_schema"]
    definition: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Schema):
    """The form of the answer."""

    format: AnthropicFormat | None = None


class MessagesChat(ChatRequest):
    """The chat that a request stands for. It is made without validation, from fields that are valid."""

    ends_at_context: ClassVar[bool] = True  # `max_tokens` is required, so clients send values of much larger models

    @property
    def json_format(self) -> JsonFormat | None:
        """As `ChatRequest` does, with the field's name in Anthropic's requests."""
        found = super().json_format
        return found and JsonFormat(found.schema, "output_config.format.schema")


class CountTokensRequest(RequestBody):
    """`POST /v1/messages/count_tokens`. Unknown fields are ignored; null is the default."""

    model_config = show(_EXAMPLE)
    refused = REFUSED

    model: Text = Field(examples=["demo", "demo:introvert"])
    persona: Text | None = None
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    system: Text | _Texts | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, fields: Any) -> Any:
        return _refuse_kinds(_refuse_kinds(fields, "system", ("text",)), "tools", ("custom",), "tools")

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names, choice = [tool.name for tool in self.tools or ()], self.tool_choice
        if len(set(names)) < len(names):
            raise Refusal(InvalidValue("two tools have the same name", param="tools"))
        if choice and choice.type in ("auto", "any") and not names:
            text = f"`tool_choice` is of the type {choice.type!r}, but there are no `tools`"
            raise Refusal(InvalidValue(text, param="tool_choice"))
        if choice and choice.type == "tool" and choice.name is None:
            raise Refusal(InvalidValue("`tool_choice` of the type 'tool' needs `name`", param="tool_choice.name"))
        if choice and choice.type == "tool" and choice.name not in names:
            raise Refusal(InvalidValue(f"there is no tool {quote(choice.name)}", param="tool_choice.name"))
        return self

    @model_validator(mode="after")
    def _check_messages(self) -> Self:
        if self.messages[-1].role == "assistant":
            text = "the last message must not be the assistant's: answers that continue a message are not supported"
            raise Refusal(UnsupportedParameter(text, param=f"messages.{len(self.messages) - 1}.role"))
        kinds = Counter[str](block.type for message in self.messages for block in message.blocks())
        for kind in ("tool_use", "tool_result"):
            if kinds[kind] > MAX_PAST_CALLS:
                text = f"they have {kinds[kind]} blocks of the type {kind!r}; the limit is {MAX_PAST_CALLS}"
                raise Refusal(InvalidValue(text, param="messages"))
        return self

    def chat_messages(self) -> list[Message]:
        """The messages of the chat, beginning with the system's."""
        text = _read_text(self.system or "")
        messages = [Message.model_construct(role="system", content=text)] if text else []
        for role, run in groupby(self.messages, key=lambda message: message.role):
            messages += _translate_turn(role, _join(message.blocks() for message in run))
        return messages

    def chat_tools(self) -> list[Tool] | None:
        """The tools of the chat; None if the model may not call any."""
        if not self.tools or (self.tool_choice and self.tool_choice.type == "none"):
            return None
        return [define_tool(tool.name, tool.description, tool.input_schema, strict=tool.strict) for tool in self.tools]


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    model_config = show({**_EXAMPLE, "max_tokens": 64, "temperature": 0})

    max_tokens: Count
    stop_sequences: Annotated[list[Text], Field(fail_fast=True, max_length=MAX_SEQUENCES)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0 is greedy
    top_k: Annotated[int, Field(ge=0), WITHIN_64_BITS] | None = None  # 0 is off
    output_config: OutputConfig | None = None
    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    persona_phase: Phase | None = None
    seed: SamplingSeed | None = None

    def chat(self) -> MessagesChat:
        """The chat that the request stands for."""
        choice, tools, form = self.tool_choice, self.chat_tools(), self.output_config and self.output_config.format
        chat_choice: Any = None
        if tools and choice:
            named = choice.type == "tool" and choice.name
            chat_choice = choose_tool(named) if named else {"auto": "auto", "any": "required"}[choice.type]
        schema = form and JsonSchema.model_validate({"schema": form.definition})
        return MessagesChat.model_construct(
            messages=self.chat_messages(),
            tools=tools,
            tool_choice=chat_choice,
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            response_format=schema and SchemaFormat.model_construct(type="json_schema", json_schema=schema),
            stop=self.stop_sequences,
            **{name: getattr(self, name) for name in _CHAT},
        )


def _join(parts: Iterable[Sequence[Block]]) -> Iterator[Block]:
    """The blocks of the messages of one turn. A line feed separates the texts of two messages."""
    last: Block | None = None
    for blocks in parts:
        if isinstance(last, TextBlock) and isinstance(blocks[0], TextBlock):
            yield TextBlock(type="text", text="\n")
        yield from blocks
        last = blocks[-1]


def _translate_turn(role: str, blocks: Iterable[Block]) -> Iterator[Message]:
    """The chat messages of one turn: each result of a tool is one, and so is the text between them."""
    if role == "assistant":
        blocks = list(blocks)
        used = (block for block in blocks if isinstance(block, ToolUseBlock))
        calls = [record_call(block.id, block.name, encode(block.input)) for block in used]
        text = _read_text(blocks)
        content = text or None if calls else text
        thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)) or None
        yield Message.model_construct(role=role, content=content, reasoning_content=thoughts, tool_calls=calls or None)
        return
    for _, run in groupby(blocks, type):
        alike = list(run)
        results = [_translate_result(block) for block in alike if isinstance(block, ToolResultBlock)]
        yield from results or [Message.model_construct(role=role, content=_read_text(alike))]


def _read_text(content: str | Iterable[Block]) -> str:
    """The text of a content."""
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))


def _translate_result(block: ToolResultBlock) -> Message:
    return Message.model_construct(role="tool", content=_read_text(block.content or ""), tool_call_id=block.tool_use_id)
