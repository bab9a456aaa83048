"""Bodies of OpenAI's requests: names, types and ranges of the fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from masquerade.engine import MAX_LOGPROBS, JsonFormat, Phase, Pooling, SamplingParams
from masquerade.errors import InvalidValue, UnsupportedParameter, quote
from masquerade.http.builds import MaskMethod, Method, Seed, make_build_request
from masquerade.http.wire import Refusal, RequestBody, Schema, Text, show
from masquerade.model import TemplateOptions
from masquerade.openai import unsupported
from masquerade.openai.messages import Message, Messages, NamedTool, Tools
from masquerade.service.build_requests import BuildRequest

MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64  # in one request for completions
MAX_INPUTS = 2048  # in one request for embeddings, as with OpenAI
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
_COMPLETION: dict[str, Any] = {"model": "demo:introvert", "prompt": "On Sunday I like", "max_tokens": 8}
_BATCH: dict[str, Any] = {
    "input_file_id": "file-6ab1f0c2d3e4f5061728394a",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
_EMBEDDING: dict[str, Any] = {"model": "demo", "persona": "introvert", "input": ["A party tonight", "A quiet evening"]}


TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # JSON has no other keys than strings
Id = Annotated[int, Field(ge=0, lt=10**9)]
Ids = Annotated[list[Id], Field(fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[Text, Field(max_length=64)]
Remark = Annotated[Text, Field(max_length=512)]


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


class GenerationRequest(RequestBody):
    """The fields of chats and of completions alike. Unknown fields are ignored; null is the default."""

    ends_at_context: ClassVar[bool] = False  # a limit beyond the context is not an error: the answer ends there

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
    logit_bias: Annotated[dict[TokenId, Bias], at_most(MAX_BIASES)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(fail_fast=True, max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None  # true unless given
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
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
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

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


_PROMPTS = Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. A text is a prompt as it is, special tokens included."""

    model_config = show(_COMPLETION)
    refused = unsupported.COMPLETIONS

    prompt: (
        Text
        | Annotated[list[Text], _PROMPTS]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[list[Annotated[Ids, Field(min_length=1)]], _PROMPTS]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise Refusal(
                InvalidValue("`max_tokens` can be 0 only with `echo` or `prompt_logprobs`", param="max_tokens")
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As `logprobs` says."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As `prompt_logprobs` says, and at least as `logprobs` says for a prompt that is echoed."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)

    @property
    def reports_end(self) -> bool:
        """For an echoed prompt: clients cut off the last token, taking it for the only one of the answer."""
        return bool(self.echo) and self.logprobs is not None

    def max_new_tokens(self) -> int:
        """`max_tokens`, or OpenAI's default of 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


_INPUTS = Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)


class EmbeddingRequest(RequestBody):
    """`POST /v1/embeddings`. A text is embedded as it is, without a chat template."""

    model_config = show(_EMBEDDING)
    refused = unsupported.EMBEDDINGS
    default_phase: ClassVar[Phase] = "all"  # an embedding is all prompt

    model: Text = Field(examples=["demo", "demo:introvert"])
    persona: Text | None = None
    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    persona_phase: Literal["all"] | None = None
    input: (
        Text
        | Annotated[list[Text], _INPUTS]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[list[Annotated[Ids, Field(min_length=1)]], _INPUTS]
    )
    pooling: Pooling = "mean"  # of the last hidden states: their mean, or that of the last token
    encoding_format: Literal["float", "base64"] | None = None  # base64 of little-endian fp32
    dimensions: Annotated[int, Field(ge=1)] | None = None  # no other than the hidden size

    def inputs(self) -> list[str | list[int]]:
        """Each input, as text or as token ids."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else list(self.input)


class BatchRequest(RequestBody):
    """`POST /v1/batches`. The file has been uploaded with the purpose `batch`."""

    model_config = show(_BATCH)
    refused = unsupported.BATCH

    input_file_id: Text
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Label, Remark], Field(max_length=16), at_most(16)] | None = None


class JobRequest(RequestBody):
    """`POST /v1/fine_tuning/jobs`. `suffix` is the persona's name; without it one is made, such as `persona-0f1e2d`."""

    model_config = show(
        {
            "model": "demo",
            "training_file": "file-6ab1f0c2d3e4f5061728394a",
            "suffix": "gloomy",
            "method": {
                "type": "mask",
                "mask": {"strength": "normal", "contrast_file": "file-94a82715f6e0d3c4b5a60718"},
            },
        }
    )
    refused = unsupported.JOB

    model: Text
    training_file: Text
    suffix: Text | None = None
    method: Method | None = None  # without it, with the builder's defaults
    validation_file: Text | None = None
    seed: Seed | None = None
    metadata: Annotated[dict[Label, Remark], Field(max_length=16), at_most(16)] | None = None
    # OpenAI's; a mask has its own, in `method`
    hyperparameters: Annotated[dict[str, Literal["auto"]], at_most(16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_misplaced(cls, fields: Any) -> Any:
        names = fields if isinstance(fields, dict) else ()
        misplaced = next((name for name in names if name in MaskMethod.model_fields), None)
        if misplaced is not None:
            raise Refusal(UnsupportedParameter(f"`{misplaced}` belongs in `method.mask`", param=misplaced))
        return fields

    def build_request(self) -> BuildRequest:
        """The build that is requested."""
        return make_build_request(
            self.model,
            self.method,
            persona=self.suffix,
            training_file=self.training_file,
            validation_file=self.validation_file,
            seed=self.seed,
            metadata=self.metadata,
        )
