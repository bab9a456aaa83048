"""Describes answers in OpenAPI: in one piece, and as server-sent events."""

from __future__ import annotations

import json
from typing import Any

from masquerade.http.wire import WireObject

Responses = dict[int | str, dict[str, Any]]  # by status

_HEADERS: dict[str, Any] = {
    "X-Persona-Generation": {"description": "The mask's digest.", "schema": {"type": "string"}, "required": False}
}


def describe_answer(whole: type[WireObject], description: str, events: dict[str, Any]) -> Responses:
    """The `responses` of a route that answers in one piece or, with `stream`, in `events`."""
    return {200: {"model": whole, "description": description, "content": events, "headers": _HEADERS}}


def describe_events(name: str, data: str, example: dict[str, Any]) -> dict[str, Any]:
    """Events that have a name, which is the `type` of their data. `name` and `data` describe the two."""
    fields = {"event": {"type": "string", "description": name}, "data": {"type": "string", "description": data}}
    item = {"type": "object", "required": ["event", "data"], "properties": fields}
    text = f"event: {example['type']}\ndata: {json.dumps(example)}\n\n"
    return {"text/event-stream": {"itemSchema": item, "example": text}}
