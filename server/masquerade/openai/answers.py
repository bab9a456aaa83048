"""Answers as clients read them: chats and completions, whole and in chunks.

Knows OpenAI's objects. Refuses to know where the text comes from.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from masquerade.engine import Token, token_bytes
from masquerade.http.request_log import Usage
from masquerade.http.wire import encode
from masquerade.model import Base, CallStart, ResponsePart, ToolCallParser
from masquerade.openai.tools import Toolbox
from masquerade.service.serving import ResolvedPersona

Json = dict[str, Any]


@dataclass
class ChoiceDelta:
    """A piece of one of the answers to a request: what is new of it, and in the last piece why it ended."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: str | None = None


class Answer(ABC):
    """One answer's identity, echoed by every object about it, and how it is written."""

    prefix: ClassVar[str]  # of its id
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, base: Base, resolved: ResolvedPersona) -> None:
        self._tokenizer = base.tokenizer
        self._resolved = replace(resolved, applied=None)  # a slow reader must not hold a mask
        self._identity: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": resolved.model,
            "system_fingerprint": f"{base.fingerprint[:8]}-{(resolved.digest or 'base')[:8]}",
            "persona": resolved.persona,
            "generation": resolved.digest,
            "gamma": resolved.gamma,
        }
        self._head = encode({"object": self.chunk_kind, **self._identity})[:-1]  # all chunks begin alike

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that name what was served."""
        return {"X-Persona-Generation": self._resolved.digest} if self._resolved.digest else {}

    def whole(self, pieces: Sequence[ChoiceDelta], usage: Usage) -> Json:
        """The answer in one object."""
        choices: dict[int, list[ChoiceDelta]] = {}
        for piece in pieces:
            choices.setdefault(piece.index, []).append(piece)
        rendered = [self._render_whole(index, choices[index]) for index in sorted(choices)]
        return {"object": self.whole_kind, **self._identity, "choices": rendered, "usage": usage.render()}

    def opening(self, index: int) -> str:  # noqa: ARG002 - for those who need it
        """What is sent before everything else of a choice."""
        return ""

    def chunks(self, piece: ChoiceDelta) -> str:
        """The events of a piece."""
        return "".join(map(self._chunk, self._render_pieces(piece)))

    def usage_chunk(self, usage: Usage) -> str:
        """The last chunk of a stream that was asked for its usage."""
        return f'data: {self._head},"choices":[],"usage":{encode(usage.render())}}}\n\n'

    def _chunk(self, choice: str) -> str:
        return f'data: {self._head},"choices":[{choice}],"usage":null}}\n\n'

    def _spell(self, token: int) -> bytes:
        return token_bytes(self._tokenizer, token)

    @abstractmethod
    def _render_whole(self, index: int, pieces: Sequence[ChoiceDelta]) -> Json:
        """A choice of the whole answer."""

    @abstractmethod
    def _render_pieces(self, piece: ChoiceDelta) -> Sequence[str]:
        """The choices of the chunks that a piece becomes, as JSON."""


class ChatAnswer(Answer):
    """A chat completion. Where tools are offered, calls of them are told from talk."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, base: Base, resolved: ResolvedPersona, toolbox: Toolbox | None = None) -> None:
        super().__init__(base, resolved)
        self._toolbox = toolbox
        self._readers: dict[int, ToolCallParser] = {}
        self._calls = Counter[int]()  # opened, by choice

    def opening(self, index: int) -> str:
        """The role."""
        return self._chunk(_delta(index, '{"role":"assistant","content":""}'))

    def _render_whole(self, index: int, pieces: Sequence[ChoiceDelta]) -> Json:
        text, calls = "", list[Json]()
        for piece in pieces:
            for part in self._read(piece):
                if isinstance(part, str):
                    text += part
                elif isinstance(part, CallStart):
                    self._calls[index] += 1
                    calls.append(_call(part.name))
                else:
                    calls[-1]["function"]["arguments"] += part.text
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "finish_reason": self._reason(pieces[-1]),
            "logprobs": self._logprobs([token for piece in pieces for token in piece.tokens]),
        }

    def _render_pieces(self, piece: ChoiceDelta) -> Sequence[str]:
        deltas = [self._render_part(piece.index, part) for part in self._read(piece)]
        logprobs = self._logprobs(piece.tokens)
        if logprobs and not deltas:
            deltas = [_say("")]
        choices = [_delta(piece.index, delta) for delta in deltas]
        if logprobs:
            choices[0] = _delta(piece.index, deltas[0], logprobs=encode(logprobs))
        if piece.reason:
            choices.append(_delta(piece.index, "{}", encode(self._reason(piece))))
        return choices

    def _read(self, piece: ChoiceDelta) -> Sequence[ResponsePart]:
        """What a piece means."""
        if self._toolbox is None:
            return [piece.text] if piece.text else []
        reader = self._readers.get(piece.index)
        if reader is None:
            reader = self._readers[piece.index] = self._toolbox.make_reader()
        parts = reader.push(piece.text, triggered=any(token.id in self._toolbox.marks for token in piece.tokens))
        if piece.reason:
            parts += reader.flush()
        if self._toolbox.forced:  # words are what was cut off of a call
            parts = [part for part in parts if not isinstance(part, str)]
        return parts

    def _render_part(self, index: int, part: ResponsePart) -> str:
        if isinstance(part, str):
            return _say(part)
        if isinstance(part, CallStart):
            self._calls[index] += 1
        call = _call(part.name) if isinstance(part, CallStart) else {"function": {"arguments": part.text}}
        return encode({"tool_calls": [{"index": self._calls[index] - 1, **call}]})

    def _reason(self, last: ChoiceDelta) -> str | None:
        return "tool_calls" if last.reason == "stop" and self._calls[last.index] else last.reason

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        """OpenAI's log probabilities, if the tokens have any."""
        if not tokens or tokens[0].logprob is None:
            return None
        content = [
            {
                **self._entry(token.id, token.logprob),
                "top_logprobs": [self._entry(other, logprob) for other, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        spelled = self._spell(token)
        return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}


class CompletionAnswer(Answer):
    """A completion of a text. Its chunks are small completions."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, base: Base, resolved: ResolvedPersona) -> None:
        super().__init__(base, resolved)
        self._lengths: dict[int, int] = {}  # characters of the tokens so far, by choice

    def _render_whole(self, index: int, pieces: Sequence[ChoiceDelta]) -> Json:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._render(ChoiceDelta(index, text, tokens, pieces[-1].reason))

    def _render_pieces(self, piece: ChoiceDelta) -> Sequence[str]:
        return [encode(self._render(piece))]

    def _render(self, piece: ChoiceDelta) -> Json:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.index, piece.tokens),
            "finish_reason": piece.reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json | None:
        if not tokens or tokens[0].logprob is None:
            return None
        names = [self._name(token.id) for token in tokens]
        place, offsets = self._lengths.get(index, 0), list[int]()
        for name in names:
            offsets.append(place)
            place += len(name)
        self._lengths[index] = place
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._name(other): logprob for other, logprob in token.top} | {name: token.logprob}
                for name, token in zip(names, tokens, strict=True)
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return self._spell(token).decode(errors="replace")


def _delta(index: int, delta: str, reason: str = "null", logprobs: str = "null") -> str:
    """A choice of a chunk, of parts that are JSON already."""
    return f'{{"index":{index},"delta":{delta},"finish_reason":{reason},"logprobs":{logprobs}}}'


def _say(text: str) -> str:
    return f'{{"content":{encode(text)}}}'


def _call(name: str) -> Json:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": ""}}
