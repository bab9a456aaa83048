"""Requests as clients write them.

Knows field names, types and ranges, and which fields must not be ignored. Refuses to act on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from masquerade.engine import MAX_LOGPROBS, JsonFormat, Phase, SamplingParams
from masquerade.errors import InvalidValue, UnsupportedParameter, quote
from masquerade.http.bodies import NotJson, Size, check_size, count, parse
from masquerade.http.wire import Refusal, Schema, Text, refuse
from masquerade.openai import unsupported

MOST_CHOICES = 16  # answers to one prompt
MOST_PROMPTS = 64  # in one request for completions
MOST_MESSAGES = 2048  # in one chat
MOST_TOOLS = 128
MOST_CALLS = 2048  # that were made in one chat
MOST_STOPS = 4
MOST_BIASES = 4096  # tokens with a bias

_CHAT: dict[str, Any] = {
    "model": "demo",
    "persona": "introvert",
    "messages": [{"role": "user", "content": "Would you like to come to a party?"}],
    "temperature": 0,
}
_COMPLETION: dict[str, Any] = {"model": "demo:introvert", "prompt": "On Sunday I like", "max_tokens": 8}


TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # JSON has no other keys than strings
Id = Annotated[int, Field(ge=0, lt=10**9)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


_OF_REQUESTS = ("persona", "gamma", "persona_phase")


def at_most(limit: int) -> BeforeValidator:
    """Refuses an object with more fields before they are looked at: the faults of each would be collected."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"it has {len(value)} items; the limit is {limit}")
        return value

    return BeforeValidator(check)


class TextPart(Schema):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Function(Schema):
    """A function that the model may call. Without `parameters` it has none."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """Something that the model may use: a function."""

    type: Literal["function"]
    function: Function


class FunctionReference(Schema):
    """A function by its name."""

    name: FunctionName


class NamedTool(Schema):
    """The tool that must be used."""

    type: Literal["function"]
    function: FunctionReference


class CalledFunction(Schema):
    """What was called; `arguments` is JSON as text."""

    name: Text
    arguments: Text

    @cached_property
    def value(self) -> Any:
        """The arguments as an object, unless they are no JSON. Raises `InvalidValue` as `bodies.parse` does."""
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
        """As chat templates want it: the arguments are an object, unless they are no JSON."""
        called = {"name": self.function.name, "arguments": self.function.value}
        return {"id": self.id, "type": self.type, "function": called}


class Message(Schema):
    """One message of a chat. `content` may be null in an assistant's message with `tool_calls` only."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        named = next((name for name in _OF_REQUESTS if isinstance(fields, dict) and fields.get(name) is not None), None)
        if named:
            raise Refusal(
                UnsupportedParameter(
                    f"a message cannot have `{named}`: a request has one persona, which hears the whole history; send "
                    "the history again with another `persona` to change it",
                    param=named,
                )
            )
        parts = fields.get("content") if isinstance(fields, dict) else None
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                param = f"content.{number}.type"
                raise Refusal(UnsupportedParameter(f"parts of the type {kind!r:.40} are not supported", param=param))
        return refuse(fields, unsupported.MESSAGE)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise Refusal(InvalidValue("a message needs `content`, a string or a list of parts", param="content"))
        if self.tool_calls and self.role != "assistant":
            raise Refusal(InvalidValue("only an assistant's message has `tool_calls`", param="tool_calls"))
        if self.role == "tool" and self.tool_call_id is None:
            raise Refusal(InvalidValue("a tool's message needs `tool_call_id`", param="tool_call_id"))
        return self

    def texts(self) -> Iterator[str]:
        """All that it says, piece by piece."""
        if isinstance(self.content, str):
            yield self.content
        else:
            yield from (part.text for part in self.content or ())
        for call in self.tool_calls or ():
            yield from (call.function.name, call.function.arguments)

    def plain(self) -> dict[str, Any]:
        """As chat templates want it: text only, calls as objects, and `developer` is `system`."""
        text = self.content or ""
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _check_arguments(messages: list[Message]) -> list[Message]:
    """Refuse arguments of calls that are too many values, together, or nested too deeply."""
    calls = [
        (f"{number}.tool_calls.{place}", call.function)
        for number, message in enumerate(messages)
        for place, call in enumerate(message.tool_calls or ())
    ]
    if len(calls) > MOST_CALLS:
        raise ValueError(f"they have {len(calls)} `tool_calls`; the limit is {MOST_CALLS}")
    size = Size(0, 0, 0)
    for place, function in calls:
        try:
            size = size.plus(count(function.arguments))
            check_size(size, "what the calls have in `arguments`, together,", None)
            function.value  # noqa: B018 - it is read here once, and kept
        except InvalidValue as error:
            error.param = f"{place}.function.arguments"
            raise Refusal(error) from None
    return messages


Messages = Annotated[
    list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES), AfterValidator(_check_arguments)
]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)]


class StreamOptions(Schema):
    """What a stream carries beside the answer."""

    include_usage: bool = False


class JsonSchema(Schema):
    """The form that an answer must have."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())

    name: Text = "answer"
    description: Text | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class PlainFormat(Schema):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Schema):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class GenerationRequest(Schema):
    """What requests for chats and for completions have in common. Unknown fields are ignored, null is the default."""

    model: Text = Field(examples=["demo", "demo:introvert"])
    persona: Text | None = None
    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    persona_phase: Phase | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0 is greedy
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1 are off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], at_most(MOST_BIASES)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def reported(self) -> int | None:
        """How many of the likeliest tokens are reported with each token; None if no log probability is."""
        raise NotImplementedError

    def sampling(self, choice: int = 0) -> SamplingParams:
        """How the tokens of one of the choices are chosen; OpenAI's defaults. A seed counts on with the choices."""
        return SamplingParams(
            temperature=0.0 if self.top_p == 0 else 1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed + choice,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=self.reported,
        )

    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"example": _CHAT})

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return refuse(fields, unsupported.CHAT)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise Refusal(InvalidValue("`top_logprobs` needs `logprobs` to be true", param="top_logprobs"))
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise Refusal(InvalidValue("two tools have the same name", param="tools"))
        if self.tool_choice in ("auto", "required") and not names:
            raise Refusal(
                InvalidValue(f"`tool_choice` is {self.tool_choice!r}, but there are no `tools`", param="tool_choice")
            )
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise Refusal(
                InvalidValue(f"there is no tool {quote(self.tool_choice.function.name)}", param="tool_choice")
            )
        return self

    @property
    def reported(self) -> int | None:
        """As asked by two fields."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def limit(self) -> int | None:
        """The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted(self) -> JsonFormat | None:
        """The JSON that the answer must be, if it must be JSON."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        if isinstance(self.response_format, SchemaFormat):
            return JsonFormat(self.response_format.json_schema.definition)
        return JsonFormat({"type": "object"})


_SOME_PROMPTS = Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. A text is a prompt as it is, special tokens included."""

    model_config = ConfigDict(json_schema_extra={"example": _COMPLETION})

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[
            list[Annotated[Ids, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return refuse(fields, unsupported.COMPLETIONS)

    @property
    def reported(self) -> int | None:
        """As asked by one field."""
        return self.logprobs

    def limit(self) -> int:
        """OpenAI's default is short."""
        return self.max_tokens or 16

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)
