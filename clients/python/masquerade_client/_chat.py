"""Chat completions: request bodies and the decoding of streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Unpack

from ._calls import Call, check, check_options, decoder, list_decoder
from ._errors import ConnectionFailed, UnexpectedAnswer, from_event
from ._sse import EventDecoder
from ._types import ChatOptions, Delta, Model, Prompt, Reply, Usage, decoding

CHAT = "/v1/chat/completions"
_WIRE_NAMES = {"phase": "persona_phase"}
_read_reply = decoder("a chat completion", Reply.from_json)
_read_models = list_decoder("models", Model.from_json)


def chat_body(prompt: Prompt, **options: Unpack[ChatOptions]) -> dict[str, Any]:
    """The JSON body of a chat request."""
    check_options(options, ChatOptions)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    given = {_WIRE_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    return {"messages": messages, **given}


def stream_body(prompt: Prompt, **options: Unpack[ChatOptions]) -> dict[str, Any]:
    """The JSON body of a streamed chat request."""
    return {**chat_body(prompt, **options), "stream": True, "stream_options": {"include_usage": True}}


def chat(body: Mapping[str, Any]) -> Call[Reply]:
    """A whole answer. Not idempotent: if the response is lost, the server may still be generating."""
    return Call("POST", CHAT, _read_reply, json=body)


def stream(body: Mapping[str, Any]) -> Call[None]:
    """A streamed answer, decoded by `StreamBase`."""
    return Call("POST", CHAT, check, json=body)


def list_models() -> Call[list[Model]]:
    """The models of the server."""
    return Call("GET", "/v1/models", _read_models, again=True)


def metrics() -> Call[str]:
    """The metrics of the server."""
    return Call("GET", "/metrics", lambda response: response.text, again=True)


def only_base(found: list[Model]) -> str:
    """The id of the base, the default model of a request. Raises `UnexpectedAnswer` unless there is exactly one."""
    bases = [model.id for model in found if model.parent is None]
    if len(bases) != 1:
        raise UnexpectedAnswer(f"the server has {len(bases)} base models; say which with `model`")
    return bases[0]


class StreamBase:
    """A streamed answer. `persona` and `generation` are set from the first piece on, `reply` after the last."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.persona: str | None = None
        self.generation: str | None = None
        self._model = self._id = ""
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._done = False
        self._events = EventDecoder()

    @property
    def reply(self) -> Reply:
        """The complete answer; raises ValueError before the end of the stream."""
        if not self._done:
            raise ValueError("the answer is not complete")
        if self._finish_reason is None or self._usage is None:
            raise UnexpectedAnswer("the stream ended without finish_reason or usage")
        return Reply(
            text=self.text,
            persona=self.persona,
            generation=self.generation,
            finish_reason=self._finish_reason,
            usage=self._usage,
            model=self._model,
            id=self._id,
            reasoning=self.reasoning,
        )

    def _deltas(self, chunk: bytes) -> Iterator[Delta]:
        with decoding("a stream of chat completion chunks"):
            for event in self._events.feed(chunk):
                if event == "[DONE]":
                    self._done = True
                elif text := self._read(json.loads(event)):
                    self.text += text
                    yield Delta(text, self.persona, self.generation)

    def _read(self, data: Mapping[str, Any]) -> str:
        if error := data.get("error"):
            raise from_event(error)
        self.persona = data.get("persona", self.persona)
        self.generation = data.get("generation", self.generation)
        self._model, self._id = data["model"], data["id"]
        if usage := data.get("usage"):
            self._usage = Usage.from_json(usage)
        delta = ""
        for choice in data["choices"]:
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            self.reasoning += choice["delta"].get("reasoning_content") or ""
            delta += choice["delta"].get("content") or ""
        return delta

    def _finish(self) -> None:
        if not self._done:
            raise ConnectionFailed("the connection closed in the middle of the answer")
