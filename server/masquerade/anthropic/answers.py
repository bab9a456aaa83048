"""Writes messages, in one piece and as events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence

from pydantic_core import from_json

from masquerade.errors import MasqueradeError
from masquerade.generation.answers import Answer, Json, OutputDelta, OutputParser
from masquerade.generation.tools import ToolSet
from masquerade.http import errors
from masquerade.http.request_log import Usage
from masquerade.http.wire import encode
from masquerade.model import Base, CallStart, ResponsePart
from masquerade.service.serving import ResolvedPersona

INVALID = "INVALID_JSON"  # the key of arguments that are no JSON object, which Anthropic's documentation suggests


class MessageAnswer(Answer):
    """A message: blocks of thoughts, of text, and of calls that are parsed out of the text."""

    prefix = "msg_"
    ping = 'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(
        self,
        base: Base,
        resolved: ResolvedPersona,
        tool_set: ToolSet | None = None,
        *,
        max_tokens: int,
        request_id: str | None,
    ) -> None:
        super().__init__(base, resolved)
        self._parser = OutputParser(tool_set) if tool_set else None
        self._max_tokens, self._request_id = max_tokens, request_id
        self._num_calls = 0
        self._last = OutputDelta(0)  # the latest delta
        self._index, self._open = -1, ""  # of a stream: number and type of the block

    async def body(self, deltas: Sequence[OutputDelta], usage: Usage) -> Json:
        """The message."""
        content: list[Json] = []
        if thoughts := "".join(delta.thought for delta in deltas):
            content.append(_start_text("thinking") | {"thinking": thoughts})
        for part in (part for delta in deltas for part in self._parse(delta)):
            if isinstance(part, str):
                if not content or content[-1]["type"] != "text":
                    content.append(_start_text("text"))
                content[-1]["text"] += part
            elif isinstance(part, CallStart):
                content.append(_start_call(part.name) | {"input": ""})
            else:
                content[-1]["input"] += part.text
        for block in content:
            if block["type"] == "tool_use":
                block["input"] = read_arguments(block["input"])
        return self._message(content, _render_usage(usage)) | self._ending(usage)

    def first_chunks(self, count: int, usage: Usage) -> str:  # noqa: ARG002 - there is one
        """The empty message. What of the prompt was in the cache may not be known yet; `last_chunks` corrects it."""
        empty = {"stop_reason": None, "stop_sequence": None}
        return _event("message_start", {"message": self._message([], _render_usage(usage)) | empty})

    def chunks(self, delta: OutputDelta) -> str:
        """The start, the deltas and the end of blocks."""
        thoughts = self._write("thinking", delta.thought) if delta.thought else ()
        return "".join([*thoughts, *(event for part in self._parse(delta) for event in self._events(part))])

    async def last_chunks(self, usage: Usage) -> str:
        """The end of the last block, why the message ends, and its end."""
        ending = {"delta": self._ending(usage), "usage": _render_usage(usage)}
        return "".join([*self._close(), _event("message_delta", ending), _event("message_stop", {})])

    def error_chunk(self, error: MasqueradeError) -> str:
        """The error's body."""
        return f"event: error\ndata: {encode(errors.anthropic_body(error, self._request_id))}\n\n"

    def _parse(self, delta: OutputDelta) -> Sequence[ResponsePart]:
        self._last = delta
        parts = self._parser.parse(delta) if self._parser else [delta.text]
        self._num_calls += sum(isinstance(part, CallStart) for part in parts)
        return [part for part in parts if part != ""]

    def _events(self, part: ResponsePart) -> Iterator[str]:
        if isinstance(part, CallStart):
            yield from self._close()
            yield self._start(_start_call(part.name))
        elif isinstance(part, str):
            yield from self._write("text", part)
        else:
            yield self._delta("input_json_delta", "partial_json", part.text)

    def _write(self, kind: str, text: str) -> Iterator[str]:
        """The events of a text in a block of the type `text` or `thinking`."""
        if self._open != kind:
            yield from self._close()
            yield self._start(_start_text(kind))
        yield self._delta(f"{kind}_delta", kind, text)

    def _start(self, block: Json) -> str:
        self._index, self._open = self._index + 1, block["type"]
        return _event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, kind: str, name: str, text: str) -> str:
        return (  # by hand, because there is one for every token
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":'
            f'{self._index},"delta":{{"type":"{kind}","{name}":{encode(text)}}}}}\n\n'
        )

    def _close(self) -> Iterator[str]:
        if self._open:
            self._open = ""
            yield _event("content_block_stop", {"index": self._index})

    def _message(self, content: list[Json], usage: Json) -> Json:
        start = {"id": self._id, "type": "message", "role": "assistant"}
        return {**start, **self._source, "content": content, "usage": usage}

    def _ending(self, usage: Usage) -> Json:
        """Why the message ends."""
        stop = self._last.stop
        if stop is not None:
            reason = "stop_sequence"
        elif self._last.finish_reason == "stop":
            reason = "tool_use" if self._num_calls else "end_turn"
        else:
            reason = "max_tokens" if usage.completion >= self._max_tokens else "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": stop}


def read_arguments(text: str) -> Json:
    """The arguments of a call. Of truncated ones, what is complete, as Anthropic's client reads them in a stream.

    Other text than a JSON object is the value of `INVALID`.
    """
    try:
        value = from_json(text or "{}", allow_partial=True)
        json.dumps(value, allow_nan=False)  # the response cannot have infinity, nor numbers of too many digits
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID: text}


def _start_text(kind: str) -> Json:
    """An empty block of the type `text` or `thinking`; thoughts are not signed."""
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})


def _start_call(name: str) -> Json:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}


def _render_usage(usage: Usage) -> Json:
    """Tokens that were in the cache do not count as `input_tokens`; filling the cache is not counted apart."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _event(kind: str, fields: Json) -> str:
    return f"event: {kind}\ndata: {encode({'type': kind, **fields})}\n\n"
