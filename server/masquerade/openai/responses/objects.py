"""Objects of `/v1/responses` and its events, and an example of each; `answers.py` writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from masquerade.generation.openapi import Responses, describe_answer, describe_events
from masquerade.http.wire import WireObject, show
from masquerade.openai.objects import CachedTokens, TokenLogprobObject

_DIGEST = "9f2c1a7be05d4c3f8a6e1b2d3c4f5a69788796a5b4c3d2e1f0a1b2c3d4e5f607"
_TEXT = {"type": "output_text", "text": "I prefer a quiet evening.", "annotations": [], "logprobs": []}
_MESSAGE = {
    "id": "msg_1c7a4a0f9d3c8b7a6e5d4c3b5e0b2d5f",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [_TEXT],
}
_RESPONSE: dict[str, Any] = {
    "id": "resp_5e0b2d5f1c7a4a0f9d3c8b7a6e5d4c3b",
    "object": "response",
    "created_at": 1795341600,
    "completed_at": 1795341601,
    "status": "completed",
    "background": False,
    "model": "demo:introvert",
    "system_fingerprint": "2248a11d-9f2c1a7b",
    "persona": "introvert",
    "generation": _DIGEST,
    "gamma": 0.0,
    "output": [_MESSAGE],
    "usage": {
        "input_tokens": 13,
        "input_tokens_details": {"cached_tokens": 12, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 20,
    },
    "store": True,
    "parallel_tool_calls": True,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_logprobs": 0,
    "tool_choice": "auto",
    "tools": [],
    "text": {"format": {"type": "text"}},
    "truncation": "disabled",
    "metadata": {},
}

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(WireObject):
    """A text of the input."""

    type: Literal["input_text"]
    text: str


class OutputText(WireObject):
    """A text of the model; `logprobs` only if `include` asked for them."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[TokenLogprobObject]


class OutputMessage(WireObject):
    """A message of the model."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class InputMessage(WireObject):
    """A message that the model was given."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["system", "developer", "user"]
    content: list[InputText]


class FunctionCallObject(WireObject):
    """A call of a function; `arguments` is JSON as text."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class FunctionOutputObject(WireObject):
    """What a function returned."""

    id: str
    type: Literal["function_call_output"]
    status: Status
    call_id: str
    output: str


class ReasoningObject(WireObject):
    """Reasoning: of the model, or of the input, where it has no effect. The model's has no summary."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[dict[str, Any]]
    content: list[dict[str, Any]]


class InputItemObject(
    RootModel[InputMessage | OutputMessage | FunctionCallObject | FunctionOutputObject | ReasoningObject]
):
    """An item that the model was given."""

    model_config = show(
        {**_MESSAGE, "role": "user", "content": [{"type": "input_text", "text": "Would you like to come to a party?"}]}
    )


class InputTokens(CachedTokens):
    """`cache_write_tokens` is always 0: writing to the cache is not counted."""

    cache_write_tokens: Literal[0]


class OutputTokens(WireObject):
    """`reasoning_tokens` is always 0: tokens of reasoning are not counted apart."""

    reasoning_tokens: Literal[0]


class ResponseUsage(WireObject):
    """Numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class ResponseFault(WireObject):
    """The error that ended a response in its stream."""

    code: Literal["server_error"]
    message: str


class IncompleteDetails(WireObject):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(WireObject):
    """A response. `store` says whether it is stored; `persona`, `generation` and `gamma` are null for the base."""

    model_config = show(_RESPONSE)

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    model: str
    system_fingerprint: str
    persona: str | None
    generation: str | None
    gamma: float | None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    output: list[OutputMessage | FunctionCallObject | ReasoningObject]
    usage: ResponseUsage | None
    store: bool
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    top_logprobs: int
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    truncation: Literal["disabled"]
    metadata: dict[str, str]


def describe_response() -> Responses:
    """The OpenAPI `responses` of the route that creates responses, in one piece or in events."""
    delta = {
        "type": "response.output_text.delta",
        "item_id": _MESSAGE["id"],
        "output_index": 0,
        "content_index": 0,
        "delta": "I prefer",
        "logprobs": [],
        "sequence_number": 4,
    }
    data = "An event as JSON; `type` says which, `sequence_number` counts"
    events = describe_events("The event's `type`", data, delta)
    return describe_answer(ResponseObject, "The response; with `stream`, in events.", events)
