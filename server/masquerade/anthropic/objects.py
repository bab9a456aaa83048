"""Objects of responses on Anthropic's routes, with the fields of personas, and an example of each."""

from __future__ import annotations

from typing import Any, Literal

from masquerade.generation.openapi import Responses, describe_answer, describe_events
from masquerade.http.wire import Schema, WireObject, show

_MESSAGE: dict[str, Any] = {
    "id": "msg_5e0b2d5f1c7a4a0f9d3c8b7a6e5d4c3b",
    "type": "message",
    "role": "assistant",
    "model": "demo:introvert",
    "system_fingerprint": "2248a11d-9f2c1a7b",
    "persona": "introvert",
    "generation": "9f2c1a7be05d4c3f8a6e1b2d3c4f5a69788796a5b4c3d2e1f0a1b2c3d4e5f607",
    "gamma": 0.0,
    "content": [{"type": "text", "text": "I prefer a quiet evening."}],
    "usage": {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 12,
        "output_tokens": 7,
    },
    "stop_reason": "end_turn",
    "stop_sequence": None,
}
_DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "I prefer"}}


class AnthropicUsage(WireObject):
    """Numbers of tokens. The prompt has `input_tokens` and, found in the cache, `cache_read_input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class GeneratedThoughts(WireObject):
    """The thoughts of a model whose chat template has them; `signature` is always empty."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class GeneratedText(WireObject):
    """Text."""

    type: Literal["text"]
    text: str


class GeneratedCall(WireObject):
    """A call of a tool, which the client runs."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class GeneratedMessage(WireObject):
    """The model's message in one piece; `persona`, `generation` and `gamma` are null for the base."""

    model_config = show(_MESSAGE)

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    system_fingerprint: str
    persona: str | None
    generation: str | None
    gamma: float | None
    content: list[GeneratedThoughts | GeneratedText | GeneratedCall]
    usage: AnthropicUsage
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None


class TokenCount(Schema):
    """The tokens of a prompt."""

    model_config = show({"input_tokens": 13})

    input_tokens: int


def describe_message() -> Responses:
    """The OpenAPI `responses` of a message in one piece or, with `stream`, in server-sent events."""
    events = describe_events("The type of the event", "The event as JSON; the last one is `message_stop`", _DELTA)
    return describe_answer(GeneratedMessage, "The message; with `stream`, in events.", events)
