"""The body of `POST /v1/responses`: its items and tools, and the chat that it stands for."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from masquerade.engine import MAX_LOGPROBS
from masquerade.errors import InvalidValue, MasqueradeError, UnsupportedParameter
from masquerade.generation.messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    FunctionName,
    Message,
    NamedTool,
    Tool,
    ToolCall,
    choose_tool,
    define_tool,
    record_call,
)
from masquerade.generation.requests import ChatRequest, Count, GenerationRequest, JsonSchema, PlainFormat, SchemaFormat
from masquerade.http.wire import Refusal, Schema, Text
from masquerade.openai import unsupported
from masquerade.openai.schemas import Metadata

LOGPROBS = "message.output_text.logprobs"  # the one value of `include` that adds something
MAX_INCLUDE = 32
_ID_LENGTH = 32  # hexadecimal digits of the id of a response

_RESPONSE: dict[str, Any] = {
    "model": "demo",
    "persona": "introvert",
    "input": "Would you like to come to a party?",
    "temperature": 0,
}
_HIDDEN = ("n", "max_tokens", "prompt_logprobs", "stream_options")  # fields of chats that responses do not have

Json = dict[str, Any]


class ContentText(Schema):
    """A text in a message or in the output of a function."""

    type: Literal["input_text", "output_text"]
    text: Text


class Refused(Schema):
    """What an assistant of another server refused to say."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        """The refusal."""
        return self.refusal


def _refuse_parts(value: Any) -> Any:
    """Refuse parts of other types than text by name."""
    for number, part in enumerate(value if isinstance(value, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("input_text", "output_text", "refusal"):
            param = f"{number}.type"
            raise Refusal(UnsupportedParameter(f"parts of the type {kind!r:.40} are not supported", param=param))
    return value


Part = ContentText | Refused


def _find_form(value: Any) -> str | None:
    """Which form a content has: with one form, an error names the place inside of it."""
    return "Text" if isinstance(value, str) else "List" if isinstance(value, list) else None


_TEXT_OR_LIST = Discriminator(
    _find_form, custom_error_type="text_or_list", custom_error_message="Input should be a valid string or a valid list"
)


Content = Annotated[
    Annotated[Text, Tag("Text")] | Annotated[list[Part], Tag("List"), Field(fail_fast=True, min_length=1)],
    _TEXT_OR_LIST,
    BeforeValidator(_refuse_parts),
]


class Item(Schema):
    """An item of the input; items of responses can be sent back as they are."""

    id: Text | None = None

    def render(self) -> Json:
        """The item as `/input_items` shows it."""
        raise NotImplementedError

    def _draw_id(self, prefix: str) -> str:
        return self.id or f"{prefix}{uuid.uuid4().hex}"


class MessageItem(Item):
    """A message; `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def message(self) -> Message:
        """The message of a chat."""
        return Message(role=self.role, content=_text(self.content))

    def render(self) -> Json:
        """The message, with a list of parts."""
        text = _text(self.content)
        part: Json = {"type": "input_text", "text": text}
        if self.role == "assistant":
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        fields = {"type": "message", "status": "completed", "role": self.role, "content": [part]}
        return {"id": self._draw_id("msg_"), **fields}


class FunctionCallItem(Item):
    """A call that the model made; `arguments` is JSON as text."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text

    def call(self) -> ToolCall:
        """The call of a chat."""
        return record_call(self.call_id, self.name, self.arguments)

    def render(self) -> Json:
        """The call."""
        fields = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return {"id": self._draw_id("fc_"), "type": "function_call", "status": "completed", **fields}


class FunctionOutputItem(Item):
    """What the function of a call returned."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Content

    def message(self) -> Message:
        """The message of a chat."""
        return Message(role="tool", tool_call_id=self.call_id, content=_text(self.output))

    def render(self) -> Json:
        """The output."""
        fields = {"call_id": self.call_id, "output": _text(self.output)}
        return {"id": self._draw_id("fco_"), "type": "function_call_output", "status": "completed", **fields}


class ReasoningItem(Item):
    """Reasoning of a model; it is kept with the input and has no effect."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = Field([])
    content: list[dict[str, Any]] | None = None

    def render(self) -> Json:
        """The reasoning, without encrypted content."""
        fields = {"summary": self.summary, "content": self.content or []}
        return {"id": self._draw_id("rs_"), "type": "reasoning", "status": "completed", **fields}


class ItemReference(Schema):
    """An item of the output of a stored response, by its id."""

    type: Literal["item_reference"]
    id: Text

    @property
    def response_id(self) -> str:
        """The response with the item, as `make_item_id` has put it into the id."""
        return f"resp_{self.id.partition('_')[2][:_ID_LENGTH]}"


def make_item_id(kind: str, response_id: str, number: int) -> str:
    """The id of an item of an output, from its type and number. The id of the response is a part of it."""
    prefix = {"message": "msg_", "function_call": "fc_", "reasoning": "rs_"}[kind]
    return f"{prefix}{response_id.removeprefix('resp_')}{number:02x}"


_ITEMS = {
    "message": "MessageItem",
    "function_call": "FunctionCallItem",
    "function_call_output": "FunctionOutputItem",
    "reasoning": "ReasoningItem",
    "item_reference": "ItemReference",
}


def _find_tag(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return _ITEMS.get(kind) if isinstance(kind, str) else None


def _refuse_item(item: Any) -> Any:
    """Refuse items of other types by name."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if isinstance(kind, str) and kind not in _ITEMS:
        raise Refusal(UnsupportedParameter(f"items of the type {kind!r:.40} are not supported", param="type"))
    return item


InputItem = Annotated[
    Annotated[MessageItem, Tag("MessageItem")]
    | Annotated[FunctionCallItem, Tag("FunctionCallItem")]
    | Annotated[FunctionOutputItem, Tag("FunctionOutputItem")]
    | Annotated[ReasoningItem, Tag("ReasoningItem")]
    | Annotated[ItemReference, Tag("ItemReference")],
    Discriminator(_find_tag, custom_error_type="item_type", custom_error_message="an item needs a known `type`"),
    BeforeValidator(_refuse_item),
]
ResolvedItem = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
Items = Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
_STORED = TypeAdapter[list[ResolvedItem]](list[Annotated[ResolvedItem, Field(discriminator="type")]])


def read_items(stored: Sequence[Json]) -> list[ResolvedItem]:
    """Items that `Item.render` or an answer wrote."""
    return _STORED.validate_python(list(stored))


def _refuse_type(value: Any) -> Any:
    """Refuse tools, and choices of tools, of other types than functions by name."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise Refusal(UnsupportedParameter(f"the type {kind!r:.40} is not supported; `function` is", param="type"))
    return value


class FunctionTool(Schema):
    """A function that the model may call. Its arguments match the schema unless `strict` is false."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        """The tool of a chat."""
        return define_tool(self.name, self.description, self.parameters, strict=self.is_strict)

    def render(self) -> Json:
        """The function as a response repeats it; the schema is not copied, because it may be large."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", **fields, "strict": self.is_strict}

    @property
    def is_strict(self) -> bool:
        """Whether arguments must match the schema."""
        return self.strict is not False


class FunctionChoice(Schema):
    """The function that the model must call."""

    type: Literal["function"]
    name: FunctionName


class TextSchema(JsonSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


class TextConfig(Schema):
    """The format of the text."""

    format: Annotated[PlainFormat | TextSchema, Field(discriminator="type")] | None = None

    def render(self) -> Json:
        """The format as a response repeats it."""
        given = self.format
        if not isinstance(given, TextSchema):
            return {"type": given.type if given else "text"}
        fields = {"name": given.name, "description": given.description, "schema": given.definition}
        return {"type": "json_schema", **fields, "strict": given.strict}


def _describe(schema: Json) -> None:
    """Add the example, and leave out what responses do not have."""
    schema["example"] = _RESPONSE
    for name in _HIDDEN:
        del schema["properties"][name]


class ResponseRequest(GenerationRequest):
    """`POST /v1/responses`. The fields of sampling are those of chats."""

    model_config = ConfigDict(json_schema_extra=_describe)
    refused = unsupported.RESPONSES

    input: Annotated[Annotated[Text, Tag("Text")] | Annotated[Items, Tag("List")], _TEXT_OR_LIST]
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: bool | None = None
    max_output_tokens: Count | None = None
    include: Annotated[list[Text], Field(fail_fast=True, max_length=MAX_INCLUDE)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    text: TextConfig | None = None
    tools: (
        Annotated[
            list[Annotated[FunctionTool, BeforeValidator(_refuse_type)]], Field(fail_fast=True, max_length=MAX_TOOLS)
        ]
        | None
    ) = None
    tool_choice: (
        Annotated[Literal["none", "auto", "required"] | FunctionChoice, BeforeValidator(_refuse_type)] | None
    ) = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None

    @property
    def num_logprobs(self) -> int | None:
        """As `include` and `top_logprobs` say."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    def items(self) -> list[InputItem]:
        """The input; a string is the message of a user."""
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def chat(self, items: Sequence[ResolvedItem]) -> ChatRequest:
        """The chat that this stands for, of the items of earlier responses and of the input.

        Raises `InvalidValue` as `ChatRequest` does, and if there is no message.
        """
        messages = list(_join(items))
        if self.instructions:
            messages.insert(0, Message(role="system", content=self.instructions))
        if not messages:
            raise InvalidValue("`input` has no message", param="input")
        shared = {name: getattr(self, name) for name in GenerationRequest.model_fields if name not in _HIDDEN}
        try:
            return ChatRequest(
                **shared,
                messages=messages,
                tools=[tool.tool() for tool in self.tools] if self.tools else None,
                tool_choice=self._tool_choice(),
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=self._response_format(),
                logprobs=self.num_logprobs is not None,
                top_logprobs=self.num_logprobs,
                max_completion_tokens=self.max_output_tokens,
            )
        except ValidationError as invalid:
            raise _translate(invalid) from None

    def _tool_choice(self) -> Literal["none", "auto", "required"] | NamedTool | None:
        if isinstance(self.tool_choice, FunctionChoice):
            return choose_tool(self.tool_choice.name)
        return self.tool_choice

    def _response_format(self) -> PlainFormat | SchemaFormat | None:
        given = self.text.format if self.text else None
        return SchemaFormat(type="json_schema", json_schema=given) if isinstance(given, TextSchema) else given


def _text(content: str | Sequence[ContentText | Refused]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _join(items: Sequence[ResolvedItem]) -> Iterator[Message]:
    """The messages of a chat: calls belong to the assistant's message before them, and reasoning is left out."""
    text: str | None = None  # of an assistant's message that calls may follow
    calls: list[ToolCall] = []
    for item in (*items, None):
        if isinstance(item, ReasoningItem):
            continue
        if isinstance(item, FunctionCallItem):
            calls.append(item.call())
            continue
        if text is not None or calls:
            yield Message(role="assistant", content=text, tool_calls=calls or None)
            text, calls = None, []
        if isinstance(item, MessageItem) and item.role == "assistant":
            text = _text(item.content)
        elif item is not None:
            yield item.message()


def _translate(invalid: ValidationError) -> MasqueradeError:
    """The error of a chat, with the names of a response's fields."""
    fault = invalid.errors()[0]
    field = str(fault["loc"][0]) if fault["loc"] else None
    refusal = fault.get("ctx", {}).get("error")
    error = refusal.error if isinstance(refusal, Refusal) else InvalidValue(fault["msg"], param=field)
    if field == "messages":
        error.param = "input"
    return error
