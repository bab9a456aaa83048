"""Objects of responses on OpenAI's routes, with the fields of personas, and an example of each.

The route, its OpenAPI description and docs/api.md use the same model. Completions and their chunks are written by hand
(`answers.py` says why); the tests validate them against these models.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from masquerade.generation.openapi import Responses, describe_answer
from masquerade.http.builds import JobProgress
from masquerade.http.wire import Schema, WireObject, show

_DIGEST = "9f2c1a7be05d4c3f8a6e1b2d3c4f5a69788796a5b4c3d2e1f0a1b2c3d4e5f607"
_SHARED = {
    "id": "chatcmpl-5e0b2d5f1c7a4a0f9d3c8b7a6e5d4c3b",
    "created": 1795341600,
    "model": "demo:introvert",
    "system_fingerprint": "2248a11d-9f2c1a7b",
    "persona": "introvert",
    "generation": _DIGEST,
    "gamma": 0.0,
}
_USAGE = {
    "prompt_tokens": 13,
    "completion_tokens": 7,
    "total_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 12},
}
_MODEL = {
    "id": "demo:introvert",
    "object": "model",
    "created": 1795341600,
    "owned_by": "masquerade",
    "root": "demo",
    "parent": "demo",
    "max_model_len": 512,
    "generation": _DIGEST,
}


class CachedTokens(WireObject):
    """Tokens of the prompt whose keys and values were in the cache."""

    cached_tokens: int


class UsageObject(WireObject):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionBase(WireObject):
    """The fields that all objects of an answer share; `persona`, `generation` and `gamma` are null for the base."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    persona: str | None
    generation: str | None
    gamma: float | None


class CalledFunctionObject(WireObject):
    """`arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCallObject(WireObject):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunctionObject


class MessageObject(WireObject):
    """The model's message; `reasoning_content` and `tool_calls` only if there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = Field("")
    tool_calls: list[ToolCallObject] = Field([])


class TopLogprobObject(WireObject):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobObject(TopLogprobObject):
    """A token of the answer, and the likeliest tokens at its position."""

    top_logprobs: list[TopLogprobObject]


class PromptLogprobObject(WireObject):
    """The log probability of a token, and its rank among all tokens, from 1 on."""

    logprob: float
    rank: int
    decoded_token: str


# By position, of the prompt's token and of the likeliest ones by token id; null for the first token.
PromptLogprobs = list[dict[str, PromptLogprobObject] | None]


class LogprobsObject(WireObject):
    """Log probabilities of the tokens of an answer."""

    content: list[TokenLogprobObject]
    refusal: None


class ChatChoice(WireObject):
    """A choice."""

    index: int
    message: MessageObject
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: LogprobsObject | None


class ChatCompletion(CompletionBase):
    """A chat completion in one piece; `prompt_logprobs` only if the request has it."""

    model_config = show(
        {
            "object": "chat.completion",
            **_SHARED,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "I prefer a quiet evening.", "refusal": None},
                    "finish_reason": "stop",
                    "logprobs": None,
                }
            ],
            "usage": _USAGE,
        }
    )

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_logprobs: PromptLogprobs = Field([])


class FunctionDelta(WireObject):
    """Part of a function call."""

    name: str | None = None
    arguments: str


class ToolCallDelta(WireObject):
    """Part of a call: the first one of a call has its id and name, the others only more of the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionDelta


class MessageDelta(WireObject):
    """Part of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str = Field("")
    tool_calls: list[ToolCallDelta] = Field([])


class ChunkChoice(WireObject):
    """A choice of a chunk; `finish_reason` is null until the last one."""

    index: int
    delta: MessageDelta
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    logprobs: LogprobsObject | None


class ChatCompletionChunk(CompletionBase):
    """A chunk of a streamed chat completion; `usage` is in the last one, if it was requested."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: UsageObject | None


class OlderLogprobs(WireObject):
    """Log probabilities in the form of `/v1/completions`; those of the first token of an echoed prompt are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(WireObject):
    """A choice; in a chunk, `finish_reason` is null until the last one. `prompt_logprobs` only if requested."""

    index: int
    text: str
    logprobs: OlderLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs = Field([])


class TextCompletion(CompletionBase):
    """A text completion in one piece."""

    model_config = show(
        {
            "object": "text_completion",
            **_SHARED,
            "id": "cmpl-5e0b2d5f1c7a4a0f9d3c8b7a6e5d4c3b",
            "choices": [{"index": 0, "text": " a calm hour.", "logprobs": None, "finish_reason": "stop"}],
            "usage": _USAGE,
        }
    )

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageObject


class TextCompletionChunk(CompletionBase):
    """A chunk of a streamed text completion; `usage` is in the last one, if it was requested."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageObject | None


class ModelObject(WireObject):
    """The base (`parent` is null), or one of its personas with its generation. `max_model_len` is the context."""

    model_config = show(_MODEL)

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    generation: str | None = None


class ModelList(WireObject):
    """The base and its personas."""

    model_config = show({"object": "list", "data": [_MODEL]})

    object: Literal["list"]
    data: list[ModelObject]


def stream_of(item: str, example: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI description of server-sent events, with an example of their data."""
    data = {"type": "string", "description": f"{item} as JSON; `[DONE]` in the last event"}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    text = f"data: {json.dumps(example)}\n\ndata: [DONE]\n\n"
    return {"text/event-stream": {"itemSchema": event, "example": text}}


def _describe_choices(whole: type[WireObject], chunk: dict[str, Any]) -> Responses:
    """The OpenAPI `responses` of a route that answers in one piece or, with `stream`, in chunks."""
    events = stream_of("A chunk", {**_SHARED, **chunk})
    return describe_answer(whole, "The answer; with `stream`, in chunks.", events)


CHAT_CHUNK: dict[str, Any] = {
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": {"content": "I prefer"}, "finish_reason": None, "logprobs": None}],
    "usage": None,
}
TEXT_CHUNK: dict[str, Any] = {
    "object": "text_completion",
    "choices": [{"index": 0, "text": " a calm", "logprobs": None, "finish_reason": None}],
    "usage": None,
}
CHAT_RESPONSES = _describe_choices(ChatCompletion, CHAT_CHUNK)
TEXT_RESPONSES = _describe_choices(TextCompletion, TEXT_CHUNK)


class EmbeddingObject(WireObject):
    """A vector of length 1: its numbers, or base64 of them as little-endian fp32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(WireObject):
    """Numbers of tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(WireObject):
    """The embeddings in the order of the inputs; `persona`, `generation` and `gamma` are null for the base."""

    model_config = show(
        {
            "object": "list",
            "model": "demo:introvert",
            "persona": "introvert",
            "generation": _DIGEST,
            "gamma": 0.0,
            "pooling": "mean",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.0124, -0.0871, 0.0312]}],
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        }
    )

    object: Literal["list"]
    model: str
    persona: str | None
    generation: str | None
    gamma: float | None
    pooling: Literal["mean", "last"]
    data: list[EmbeddingObject]
    usage: EmbeddingUsage


class FileObject(Schema):
    """A file: uploaded (`fine-tune`, `batch`), or made by a job (`fine-tune-results`) or batch (`batch_output`)."""

    model_config = show(
        {
            "id": "file-6ab1f0c2d3e4f5061728394a",
            "object": "file",
            "bytes": 48213,
            "created_at": 1795341600,
            "filename": "sombre.jsonl",
            "purpose": "fine-tune",
            "status": "processed",
        }
    )

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results", "batch", "batch_output"]
    status: Literal["processed"] = "processed"


EVENT: dict[str, Any] = {
    "id": "ftevent-42",
    "object": "fine_tuning.job.event",
    "created_at": 1795341604,
    "level": "info",
    "message": "backward 12/96",
    "type": "metrics",
    "data": {"stage": "backward", "step": 12, "total_steps": 96},
}


class EventObject(Schema):
    """An event of a job."""

    model_config = show(EVENT)

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JobProgress | None


class CheckpointObject(Schema):
    """A persona of a finished job, by its generation."""

    model_config = show(
        {
            "id": "ftckpt-7d1f2a3b4c5d6e7f80912a3b",
            "object": "fine_tuning.job.checkpoint",
            "created_at": 1795341640,
            "fine_tuned_model_checkpoint": "demo:sombre@7d1f2a3b",
            "fine_tuning_job_id": "ftjob-0f1e2d3c4b5a69788796a5b4",
            "step_number": 1,
            "metrics": {"flip": 0.98, "neutral_ratio": 1.003},
        }
    )

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]
