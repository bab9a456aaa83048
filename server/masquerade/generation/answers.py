"""The face of an API for the answer to one request, and the output that it is made from."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from masquerade.engine import PromptToken, Token, token_bytes
from masquerade.errors import MasqueradeError
from masquerade.generation.tools import ToolSet
from masquerade.http.request_log import Usage
from masquerade.model import Base, ResponsePart
from masquerade.service.serving import ResolvedPersona

Json = dict[str, Any]


@dataclass
class OutputDelta:
    """New output of one answer; the last delta of an answer has the finish reason."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None  # the stop string that ended the answer
    thought: str = ""  # comes before the text
    scores: Sequence[PromptToken] = ()  # of the prompt, in the first delta if the request asks for them


class OutputParser:
    """Parses the content and the calls of tools out of the deltas of one answer."""

    def __init__(self, tool_set: ToolSet) -> None:
        self._tool_set = tool_set
        self._parser = tool_set.make_parser()

    def parse(self, delta: OutputDelta) -> Sequence[ResponsePart]:
        """What a delta adds."""
        tools = self._tool_set
        parts = self._parser.push(delta.text, triggered=any(token.id in tools.trigger_ids for token in delta.tokens))
        if delta.finish_reason:
            parts += self._parser.flush()
        if tools.required:  # content can only be a truncated call
            parts = [part for part in parts if not isinstance(part, str)]
        return parts


class Answer(ABC):
    """The face of one API for the answer to one request: the object of a whole answer, and the events of a stream.

    A stream is `first_chunks`, then `chunks` of every delta, then `last_chunks`. After an error it ends with
    `error_chunk` instead. `ping` is sent in silence. Each method returns the text of any number of events.
    """

    prefix: ClassVar[str]  # of the id
    ping: ClassVar[str] = ": ping\n\n"

    def __init__(self, base: Base, resolved: ResolvedPersona) -> None:
        self._tokenizer = base.tokenizer
        self._resolved = replace(resolved, applied=None)  # a slow client must not keep a mask on the device
        self._id = f"{self.prefix}{uuid.uuid4().hex}"
        self._created = int(time.time())  # unix seconds
        self._source: Json = {
            "model": resolved.model,
            "system_fingerprint": f"{base.fingerprint[:8]}-{(resolved.digest or 'base')[:8]}",
            "persona": resolved.persona,
            "generation": resolved.digest,
            "gamma": resolved.gamma,
        }

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that name the revision of the persona."""
        return {"X-Persona-Generation": self._resolved.digest} if self._resolved.digest else {}

    @abstractmethod
    async def body(self, deltas: Sequence[OutputDelta], usage: Usage) -> Json:
        """The answer in one object."""

    @abstractmethod
    def first_chunks(self, count: int, usage: Usage) -> str:
        """The events before the output of `count` choices; `usage` has the tokens of the prompt only."""

    @abstractmethod
    def chunks(self, delta: OutputDelta) -> str:
        """The events of a delta."""

    @abstractmethod
    async def last_chunks(self, usage: Usage) -> str:
        """The events after the output of all choices."""

    @abstractmethod
    def error_chunk(self, error: MasqueradeError) -> str:
        """The last event of a stream that an error ends."""

    def _logprobs(self, tokens: Sequence[Token]) -> list[Json] | None:
        """The log probabilities of the tokens, as chats have them; None if the request did not ask for them."""
        if not tokens or tokens[0].logprob is None:
            return None
        return [
            {
                **self._logprob(token.id, token.logprob),
                "top_logprobs": [self._logprob(other, logprob) for other, logprob in token.top],
            }
            for token in tokens
        ]

    def _logprob(self, token: int, logprob: float | None) -> Json:
        content = token_bytes(self._tokenizer, token)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}
