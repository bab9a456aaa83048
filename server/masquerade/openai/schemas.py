"""Bodies of OpenAI's requests: names, types and ranges of the fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from masquerade.engine import MAX_LOGPROBS, Phase, Pooling
from masquerade.errors import InvalidValue, UnsupportedParameter
from masquerade.generation.requests import WITHIN_64_BITS, GenerationRequest, Id, PersonaFields, at_most
from masquerade.http.builds import MaskMethod, Method, Seed, make_build_request
from masquerade.http.wire import Refusal, RequestBody, Text, show
from masquerade.openai import unsupported
from masquerade.service.build_requests import BuildRequest

MAX_PROMPTS = 64  # in one request for completions
MAX_INPUTS = 2048  # in one request for embeddings, as with OpenAI

_COMPLETION: dict[str, Any] = {"model": "demo:introvert", "prompt": "On Sunday I like", "max_tokens": 8}
_EMBEDDING: dict[str, Any] = {"model": "demo", "persona": "introvert", "input": ["A party tonight", "A quiet evening"]}

Ids = Annotated[list[Id], Field(fail_fast=True)]
Label = Annotated[Text, Field(max_length=64)]
Remark = Annotated[Text, Field(max_length=512)]
Metadata = Annotated[dict[Label, Remark], Field(max_length=16), at_most(16)]

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
    max_tokens: Annotated[int, Field(ge=0), WITHIN_64_BITS] | None = None

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


class EmbeddingRequest(PersonaFields):
    """`POST /v1/embeddings`. A text is embedded as it is, without a chat template."""

    model_config = show(_EMBEDDING)
    refused = unsupported.EMBEDDINGS

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

    @property
    def default_phase(self) -> Phase:
        """An embedding is all prompt."""
        return "all"

    def inputs(self) -> list[str | list[int]]:
        """Each input, as text or as token ids."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if isinstance(self.input[0], int) else list(self.input)


class JobRequest(RequestBody):
    """`POST /v1/fine_tuning/jobs`. `suffix` is the persona's name; without it one is made, such as `persona-0f1e2d`."""

    model_config = show(
        {
            "model": "demo",
            "training_file": "file-6ab1f0c2d3e4f5061728394a",
            "suffix": "sombre",
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
    metadata: Metadata | None = None
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
