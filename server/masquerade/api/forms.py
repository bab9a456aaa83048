"""What chats, completions and lists of models look like, for the description of the interface.

Knows OpenAI's objects, what personas add to them, and an example of each. Nothing is checked against them while the
server serves; the tests check that what it sends fits.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

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


class Form(BaseModel):
    """An object of an answer."""

    model_config = ConfigDict(extra="forbid")


def _show(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"example": example})


class CachedTokens(Form):
    """Tokens of the prompt that needed no computing."""

    cached_tokens: int


class UsageForm(Form):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Said(Form):
    """What every object of an answer has: `persona`, `generation` and `gamma` are null for the bare base."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    persona: str | None
    generation: str | None
    gamma: float | None


class CalledFunctionForm(Form):
    """`arguments` is JSON as text."""

    name: str
    arguments: str


class CallForm(Form):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunctionForm


class MessageForm(Form):
    """The model's message; `tool_calls` only if there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallForm] = []


class LikelyForm(Form):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenForm(LikelyForm):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[LikelyForm]


class LogprobsForm(Form):
    """Log probabilities of the tokens of an answer."""

    content: list[TokenForm]
    refusal: None


class ChatChoice(Form):
    """One of the answers."""

    index: int
    message: MessageForm
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: LogprobsForm | None


class ChatCompletion(Said):
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
    usage: UsageForm


class OlderLogprobs(Form):
    """Log probabilities in the form of `/v1/completions`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Form):
    """One of the texts."""

    index: int
    text: str
    logprobs: OlderLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Said):
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
    usage: UsageForm


class ModelForm(Form):
    """The base (`parent` null), or a persona of it with its generation."""

    model_config = _show(_MODEL)

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    generation: str | None = None


class ModelList(Form):
    """The base and its personas."""

    model_config = _show({"object": "list", "data": [_MODEL]})

    object: Literal["list"]
    data: list[ModelForm]


class Health(Form):
    """All is well."""

    model_config = _show({"status": "ok"})

    status: Literal["ok", "ready"]


def stream_of(item: str, example: dict[str, Any]) -> dict[str, Any]:
    """The description of server-sent events: what each of them carries, in a word and as an example."""
    data = {"type": "string", "description": f"{item} as JSON; `[DONE]` in the last event"}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    text = f"data: {json.dumps(example)}\n\ndata: [DONE]\n\n"
    return {"text/event-stream": {"itemSchema": event, "example": text}}


def either(whole: type[Form], chunk: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
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
