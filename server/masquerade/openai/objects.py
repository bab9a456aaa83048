"""What chats, completions and lists of models look like, for the description of the interface.

Knows OpenAI's objects, what personas add to them, and an example of each. Nothing is checked against them while the
server serves; the tests check that what it sends fits.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from masquerade.http.wire import Schema, show
from masquerade.jobs import State

_DIGEST = "9f2c1a7be05d4c3f8a6e1b2d3c4f5a69788796a5b4c3d2e1f0a1b2c3d4e5f607"
_SAID = {
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
    "generation": _DIGEST,
}


class WireObject(BaseModel):
    """An object of an answer."""

    model_config = ConfigDict(extra="forbid")


def _show(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"example": example})


class CachedTokens(WireObject):
    """Tokens of the prompt that needed no computing."""

    cached_tokens: int


class UsageObject(WireObject):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionBase(WireObject):
    """What every object of an answer has: `persona`, `generation` and `gamma` are null for the bare base."""

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
    """The model's message; `tool_calls` only if there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallObject] = []


class TopLogprobObject(WireObject):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobObject(TopLogprobObject):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprobObject]


class LogprobsObject(WireObject):
    """Log probabilities of the tokens of an answer."""

    content: list[TokenLogprobObject]
    refusal: None


class ChatChoice(WireObject):
    """One of the answers."""

    index: int
    message: MessageObject
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: LogprobsObject | None


class ChatCompletion(CompletionBase):
    """An answer in one piece."""

    model_config = _show(
        {
            "object": "chat.completion",
            **_SAID,
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


class OlderLogprobs(WireObject):
    """Log probabilities in the form of `/v1/completions`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(WireObject):
    """One of the texts."""

    index: int
    text: str
    logprobs: OlderLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(CompletionBase):
    """Texts that went on."""

    model_config = _show(
        {
            "object": "text_completion",
            **_SAID,
            "id": "cmpl-5e0b2d5f1c7a4a0f9d3c8b7a6e5d4c3b",
            "choices": [{"index": 0, "text": " a calm hour.", "logprobs": None, "finish_reason": "stop"}],
            "usage": _USAGE,
        }
    )

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageObject


class ModelObject(WireObject):
    """The base (`parent` null), or a persona of it with its generation."""

    model_config = _show(_MODEL)

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    generation: str | None = None


class ModelList(WireObject):
    """The base and its personas."""

    model_config = _show({"object": "list", "data": [_MODEL]})

    object: Literal["list"]
    data: list[ModelObject]


def stream_of(item: str, example: dict[str, Any]) -> dict[str, Any]:
    """The description of server-sent events: what each of them carries, in a word and as an example."""
    data = {"type": "string", "description": f"{item} as JSON; `[DONE]` in the last event"}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    text = f"data: {json.dumps(example)}\n\ndata: [DONE]\n\n"
    return {"text/event-stream": {"itemSchema": event, "example": text}}


def either(whole: type[WireObject], chunk: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers in one piece or, with `stream`, in server-sent events."""
    headers = {
        "X-Persona-Generation": {"description": "The mask's digest.", "schema": {"type": "string"}, "required": False}
    }
    return {
        200: {
            "model": whole,
            "description": "The answer; with `stream`, in chunks.",
            "content": stream_of("A chunk", {**_SAID, **chunk}),
            "headers": headers,
        }
    }


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


class FileObject(Schema):
    """A file: uploaded (`fine-tune`), or made by a job (`fine-tune-results`)."""

    model_config = show(
        {
            "id": "file-6ab1f0c2d3e4f5061728394a",
            "object": "file",
            "bytes": 48213,
            "created_at": 1795341600,
            "filename": "gloomy.jsonl",
            "purpose": "fine-tune",
            "status": "processed",
        }
    )

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"] = "processed"


class JobFault(Schema):
    """Why a job failed; `param` is the field of its request that is at fault, where there is one."""

    code: str
    message: str
    param: str | None


class JobProgress(Schema):
    """How far the current stage of a job is; `total_steps` is null where it cannot be known beforehand."""

    stage: str
    step: int
    total_steps: int | None

    @field_validator("total_steps", mode="before")
    @classmethod
    def _unknown(cls, total: int | None) -> int | None:
        """Jobs of earlier versions have 0 where the total is not known."""
        return total or None


class BuiltPersona(Schema):
    """A persona that a job has made."""

    persona: str
    digest: str
    certificate: dict[str, Any]
    file: str | None = None


_JOB_EXAMPLE: dict[str, Any] = {
    "id": "ftjob-0f1e2d3c4b5a69788796a5b4",
    "object": "fine_tuning.job",
    "created_at": 1795341600,
    "started_at": 1795341601,
    "finished_at": None,
    "estimated_finish": 1795341640,
    "model": "demo",
    "fine_tuned_model": None,
    "organization_id": "masquerade",
    "result_files": [],
    "status": "running",
    "training_file": "file-6ab1f0c2d3e4f5061728394a",
    "validation_file": None,
    "hyperparameters": {},
    "method": {"type": "mask", "mask": {"score": "attribution", "contrast_file": "file-94a82715f6e0d3c4b5a60718"}},
    "seed": 0,
    "error": None,
    "trained_tokens": None,
    "metadata": {},
    "persona": "gloomy",
    "progress": {"stage": "backward", "step": 12, "total_steps": 96},
    "personas": [],
}


class JobObject(Schema):
    """OpenAI's job, with the name of its `persona`, its `progress` and the `personas` it has made."""

    model_config = show(_JOB_EXAMPLE)

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None  # by the duration of the last jobs
    model: str
    fine_tuned_model: str | None
    organization_id: Literal["masquerade"] = "masquerade"
    result_files: list[str]  # the masks
    status: State
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any] | None  # as it was asked for; litellm reads no other than OpenAI's
    seed: int
    error: JobFault | None
    trained_tokens: int | None  # of the examples that the masks were found in
    metadata: dict[str, str]
    persona: str  # the name that was asked for, or made; whether or not the job has come to that
    progress: JobProgress | None  # of a job that runs
    personas: list[BuiltPersona]


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
    """Something that happened to a job."""

    model_config = show(EVENT)

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JobProgress | None


class CheckpointObject(Schema):
    """A persona that a finished job has made, by its generation."""

    model_config = show(
        {
            "id": "ftckpt-7d1f2a3b4c5d6e7f80912a3b",
            "object": "fine_tuning.job.checkpoint",
            "created_at": 1795341640,
            "fine_tuned_model_checkpoint": "demo:gloomy@7d1f2a3b",
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
