"""Bodies of requests that generate, and the chat that every API's request stands for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from masquerade.engine import INT64, MAX_LOGPROBS, JsonFormat, Phase, SamplingParams
from masquerade.errors import InvalidValue, quote
from masquerade.generation import unsupported
from masquerade.generation.messages import Message, Messages, NamedTool, Tools
from masquerade.http.wire import Refusal, RequestBody, Schema, Text, show
from masquerade.model import TemplateOptions

MAX_CHOICES = 16  # answers to one prompt
MAX_STOPS = 4
MAX_STOP_IDS = 64
MAX_BIASES = 4096  # tokens with a bias
MAX_VARIABLES = 32  # of a chat template

_CHAT: dict[str, Any] = {
    "model": "demo",
    "persona": "introvert",
    "messages": [{"role": "user", "content": "Would you like to come to a party?"}],
    "temperature": 0,
}


def _check_bits(number: int) -> int:
    if abs(number) > INT64:
        raise ValueError("it has more than 64 bits")
    return number


WITHIN_64_BITS = AfterValidator(_check_bits)
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # JSON has no other keys than strings
Id = Annotated[int, Field(ge=0, lt=10**9)]
SamplingSeed = Annotated[int, WITHIN_64_BITS]
Count = Annotated[int, Field(ge=1), WITHIN_64_BITS]
Bias = Annotated[float, Field(ge=-100, le=100)]


def at_most(limit: int) -> BeforeValidator:
    """Limits the fields of an object, before pydantic validates each and collects an error for each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"it has {len(value)} items; the limit is {limit}")
        return value

    return BeforeValidator(check)


class StreamOptions(Schema):
    """Extras of a streamed answer."""

    include_usage: bool = False


class JsonSchema(Schema):
    """The JSON schema of an answer."""

    model_config = ConfigDict(protected_namespaces=())

    name: Text = "answer"
    description: Text | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class PlainFormat(Schema):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Schema):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class PersonaFields(RequestBody):
    """The fields that say which persona is applied, and how."""

    model: Text = Field(examples=["demo", "demo:introvert"])
    persona: Text | None = None
    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    persona_phase: Phase | None = None

    @property
    def default_phase(self) -> Phase | None:
        """The phase unless the request has one; None for the persona's."""
        return None


class GenerationRequest(PersonaFields):
    """The fields of chats and of completions alike. Unknown fields are ignored; null is the default."""

    ends_at_context: ClassVar[bool] = False  # a limit beyond the context is not an error: the answer ends there

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None  # 0 is greedy
    top_k: Annotated[int, Field(ge=-1), WITHIN_64_BITS] | None = None  # 0 and -1 are off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], at_most(MAX_BIASES)] | None = None
    seed: SamplingSeed | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(fail_fast=True, max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None  # true unless given
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_tokens: Annotated[int, Field(ge=0), WITHIN_64_BITS] | None = None
    max_tokens: Count | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise Refusal(
                InvalidValue("a stream has no `prompt_logprobs`; ask without `stream`", param="prompt_logprobs")
            )
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens are found for each token of the prompt; None if it is not scored."""
        return self.prompt_logprobs

    @property
    def default_phase(self) -> Phase | None:
        """The phase unless the request has one; None for the persona's. In phase `decode` the prompt is the base's, and
        so would be its log probabilities.
        """
        return None if self.num_prompt_logprobs is None else "all"

    @property
    def reports_end(self) -> bool:
        """Whether log probabilities include the token that ends the answer."""
        return False

    def ends(self, own: frozenset[int]) -> frozenset[int]:
        """Token ids that end the answer; `own` are the model's."""
        return (frozenset() if self.ignore_eos else own).union(self.stop_token_ids or ())

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are returned with each token; None for no log probabilities."""
        raise NotImplementedError

    def sampling(self, choice: int = 0) -> SamplingParams:
        """The sampling parameters of a choice, with OpenAI's defaults; choice i has the seed plus i."""
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
            logprobs=self.num_logprobs,
        )

    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def max_new_tokens(self) -> int | None:
        """The limit of the answer in tokens; None for the rest of the context."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class TemplateFields(RequestBody):
    """Fields for the chat template, as vLLM has them."""

    add_generation_prompt: bool | None = None  # true unless the final message is continued
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[Text, Any], at_most(MAX_VARIABLES)] | None = None

    @model_validator(mode="after")
    def _check_continued(self) -> Self:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise Refusal(
                    InvalidValue(
                        "`continue_final_message` and `add_generation_prompt` exclude each other",
                        param="continue_final_message",
                    )
                )
            if self.continued_text is None:
                raise Refusal(
                    InvalidValue(
                        "`continue_final_message` needs a last message of the assistant with a text and no calls",
                        param="continue_final_message",
                    )
                )
        return self

    @property
    def continued_text(self) -> str | None:
        """The text of the message that the answer continues."""
        messages: list[Message] = getattr(self, "messages", None) or []
        if not self.continue_final_message or not messages:
            return None
        last = messages[-1]
        return last.plain()["content"] or None if last.role == "assistant" and not last.tool_calls else None

    @property
    def template_options(self) -> TemplateOptions:
        """What the chat template is given."""
        continues = bool(self.continue_final_message)
        begins = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        return TemplateOptions(begins, continues, self.chat_template_kwargs or {})


class ChatRequest(TemplateFields, GenerationRequest):
    """`POST /v1/chat/completions`."""

    model_config = show(_CHAT)
    refused = unsupported.CHAT

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None

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
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise Refusal(
                InvalidValue(f"there is no tool {quote(self.tool_choice.function.name)}", param="tool_choice")
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As `logprobs` and `top_logprobs` say."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def max_new_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name `max_tokens`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def json_format(self) -> JsonFormat | None:
        """The JSON format that the answer must have; None for text."""
        if self.response_format is None or self.response_format.type == "text":
            return None
        if isinstance(self.response_format, SchemaFormat):
            return JsonFormat(self.response_format.json_schema.definition)
        return JsonFormat({"type": "object"})
