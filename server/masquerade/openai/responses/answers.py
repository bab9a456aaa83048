"""Writes responses and their events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from masquerade.engine import Token
from masquerade.errors import MasqueradeError
from masquerade.generation.answers import Answer, Json, OutputDelta, OutputParser
from masquerade.generation.tools import ToolSet
from masquerade.http import errors
from masquerade.http.request_log import Usage
from masquerade.http.wire import encode
from masquerade.model import Base, CallStart
from masquerade.openai.responses.schemas import FunctionChoice, ResponseRequest, make_item_id
from masquerade.service.serving import ResolvedPersona


class ResponseAnswer(Answer):
    """A response: its output is a list of items, which are reasoning, messages and calls.

    `save` stores the finished response and returns whether it did.
    """

    prefix = "resp_"

    def __init__(
        self,
        base: Base,
        resolved: ResolvedPersona,
        tool_set: ToolSet | None,
        *,
        request: ResponseRequest,
        store: bool,
        save: Callable[[Json], Awaitable[bool]],
    ) -> None:
        super().__init__(base, resolved)
        self._parser = OutputParser(tool_set) if tool_set else None
        self._save = save
        self._output: list[Json] = []
        self._is_open = False  # whether the last item of the output is being written
        self._pieces: list[str] = []  # of the text or the arguments of that item
        self._tokens: list[Token] = []  # of that text, if log probabilities were requested
        self._held: list[Token] = []  # those whose text the parser holds back, as it may begin a call
        self._finish_reason: str | None = None
        self._number = -1  # of the last event
        self._response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            **self._source,
            **_echo(request),
            "store": store,
            "output": self._output,
            "usage": None,
        }

    async def body(self, deltas: Sequence[OutputDelta], usage: Usage) -> Json:
        """The response."""
        for delta in deltas:
            for _ in self._add(delta):
                pass
        return await self._finish(usage)

    def first_chunks(self, count: int, usage: Usage) -> str:  # noqa: ARG002 - there is one choice
        """`response.created` and `response.in_progress`."""
        started = ("response.created", "response.in_progress")
        return "".join(self._event(kind, response=self._response) for kind in started)

    def chunks(self, delta: OutputDelta) -> str:
        """The events of new text, of calls, and of items and parts that begin and end."""
        return "".join([self._event(kind, **fields) for kind, fields in self._add(delta)])

    async def last_chunks(self, usage: Usage) -> str:
        """`response.completed`, or `response.incomplete` if the limit of tokens cut the output."""
        response = await self._finish(usage)
        return self._event(f"response.{response['status']}", response=response)

    def error_chunk(self, error: MasqueradeError) -> str:
        """`error` with the error, and `response.failed` with what there is of the output."""
        fault = errors.body(error)["error"]
        for _ in self._close("incomplete"):
            pass
        told = {name: fault[name] for name in ("code", "message", "param")}
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": fault["message"]}}
        return self._event("error", **told) + self._event("response.failed", response=self._response)

    def _add(self, delta: OutputDelta) -> Iterator[tuple[str, Json]]:
        """Add a delta to the output; the events that tell of it, by type and fields."""
        parts = self._parser.parse(delta) if self._parser else [delta.text] if delta.text else []
        self._held += delta.tokens if delta.tokens and delta.tokens[0].logprob is not None else []
        if delta.thought:
            yield from self._open_text(_reasoning())
            yield self._extend("response.reasoning_text.delta", delta.thought)
        for part in parts:
            if isinstance(part, CallStart):
                yield from self._close("completed")
                yield from self._open(_call(part.name))
            elif isinstance(part, str):
                yield from self._open_text(_message())
                yield self._extend("response.output_text.delta", part, self._held)
                self._held = []
            else:
                yield self._extend("response.function_call_arguments.delta", part.text)
        if delta.thought or any(not isinstance(part, str) for part in parts):
            self._held = []  # those of thoughts and calls are not told
        if delta.finish_reason:
            self._finish_reason = delta.finish_reason
            if not self._output:
                yield from self._open(_message())
            yield from self._close("incomplete" if delta.finish_reason == "length" else "completed")

    def _open_text(self, item: Json) -> Iterator[tuple[str, Json]]:
        """Begin an item with text, unless one of its type is being written."""
        if not (self._is_open and self._output[-1]["type"] == item["type"]):
            yield from self._close("completed")
            yield from self._open(item)

    def _open(self, item: Json) -> Iterator[tuple[str, Json]]:
        item = {"id": make_item_id(item["type"], self._id, len(self._output)), **item}
        self._output.append(item)
        self._is_open = True
        yield "response.output_item.added", {"output_index": len(self._output) - 1, "item": item}
        if part := _start_part(item["type"]):
            item["content"] = [part]
            yield "response.content_part.added", {**self._place(), "part": part}

    def _extend(self, kind: str, text: str, tokens: Sequence[Token] | None = None) -> tuple[str, Json]:
        self._pieces.append(text)
        fields = {**self._place(), "delta": text}
        if tokens is not None:
            self._tokens += tokens
            fields["logprobs"] = self._logprobs(tokens) or []
        return kind, fields

    def _close(self, status: str) -> Iterator[tuple[str, Json]]:
        """End the item that is being written, if there is one."""
        if not self._is_open:
            return
        item, text, place = self._output[-1], "".join(self._pieces), self._place()
        if item["type"] != "function_call":
            part = item["content"][0]
            told: Json = {"text": text}
            if item["type"] == "message":
                told["logprobs"] = self._logprobs(self._tokens) or []
            part |= told
            yield f"response.{part['type']}.done", {**place, **told}
            yield "response.content_part.done", {**place, "part": part}
        else:
            item["arguments"] = text
            yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": text}
        item["status"] = status
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}
        self._pieces, self._tokens, self._is_open = [], [], False

    def _place(self) -> Json:
        """Where the item that is being written is."""
        item = self._output[-1]
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        return place if item["type"] == "function_call" else {**place, "content_index": 0}

    async def _finish(self, usage: Usage) -> Json:
        cut = self._finish_reason == "length"
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": _render_usage(usage),
        }
        self._response["store"] = self._response["store"] and await self._save(self._response)
        return self._response

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return f"event: {kind}\ndata: {encode({'type': kind, **fields, 'sequence_number': self._number})}\n\n"


def _echo(request: ResponseRequest) -> Json:
    """What a response repeats of its request."""
    choice = request.tool_choice
    return {
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "max_output_tokens": request.max_output_tokens,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
        "tools": [tool.render() for tool in request.tools or ()],
        "text": {"format": request.text.render() if request.text else {"type": "text"}},
        "truncation": "disabled",
        "metadata": request.metadata or {},
    }


def _start_part(kind: str) -> Json | None:
    """The empty text of an item of a type; None for a call."""
    if kind == "message":
        return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": ""} if kind == "reasoning" else None


def _reasoning() -> Json:
    return {
        "type": "reasoning",
        "status": "in_progress",
        "summary": [],
        "content": [],
    }


def _message() -> Json:
    return {
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }


def _call(name: str) -> Json:
    return {
        "type": "function_call",
        "status": "in_progress",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": name,
        "arguments": "",
    }


def _render_usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
