"""Writes chat completions and text completions, in one piece and in chunks.

`objects.py` defines these objects as pydantic models. This is the hot path, so it writes their JSON by hand, in about
a third of the time (`benchmarks.costs`). `tests/contract/test_objects.py` validates what it writes.
"""

from __future__ import annotations

import asyncio
import uuid
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

from masquerade.engine import PromptToken, Token, token_bytes
from masquerade.errors import MasqueradeError
from masquerade.generation.answers import Answer, Json, OutputDelta, OutputParser
from masquerade.generation.tools import ToolSet
from masquerade.http import errors
from masquerade.http.request_log import Usage
from masquerade.http.wire import encode, sse
from masquerade.model import Base, CallStart, ResponsePart
from masquerade.openai.schemas import CompletionRequest
from masquerade.service.serving import ResolvedPersona


class ChoicesAnswer(Answer):
    """What chat completions and text completions have in common: a list of choices."""

    object_type: ClassVar[str]
    chunk_type: ClassVar[str]

    def __init__(self, base: Base, resolved: ResolvedPersona, *, wants_usage: bool = False) -> None:
        super().__init__(base, resolved)
        self._wants_usage = wants_usage  # at the end of a stream
        self._shared: Json = {"id": self._id, "created": self._created, **self._source}
        self._chunk_start = encode({"object": self.chunk_type, **self._shared})[:-1]  # without the closing brace

    async def body(self, deltas: Sequence[OutputDelta], usage: Usage) -> Json:
        """The choices in one object."""
        by_choice: dict[int, list[OutputDelta]] = {}
        for delta in deltas:
            by_choice.setdefault(delta.index, []).append(delta)

        def render() -> list[Json]:
            return [self._render_choice(index, by_choice[index]) for index in sorted(by_choice)]

        scored = any(delta.scores for delta in deltas)  # then it may take too long for the event loop
        choices = await asyncio.to_thread(render) if scored else render()
        return {"object": self.object_type, **self._shared, "choices": choices, "usage": _render_usage(usage)}

    def first_chunks(self, count: int, usage: Usage) -> str:  # noqa: ARG002 - for subclasses
        """No events."""
        return ""

    def chunks(self, delta: OutputDelta) -> str:
        """The chunks of a delta."""
        return "".join(map(self._chunk, self._render_delta(delta)))

    async def last_chunks(self, usage: Usage) -> str:
        """The chunk with the usage, if the request asked for it, and the end of the stream."""
        end = sse("[DONE]")
        if not self._wants_usage:
            return end
        return f'data: {self._chunk_start},"choices":[],"usage":{encode(_render_usage(usage))}}}\n\n{end}'

    def error_chunk(self, error: MasqueradeError) -> str:
        """The error's body."""
        return sse(errors.body(error))

    def _chunk(self, choice: str) -> str:
        return f'data: {self._chunk_start},"choices":[{choice}],"usage":null}}\n\n'

    @abstractmethod
    def _render_choice(self, index: int, deltas: Sequence[OutputDelta]) -> Json:
        """A choice of the answer in one piece."""

    @abstractmethod
    def _render_delta(self, delta: OutputDelta) -> Sequence[str]:
        """The choices of the chunks of a delta, as JSON; a chunk has one choice."""


class ChatAnswer(ChoicesAnswer):
    """A chat completion. With tools, calls are parsed out of the text. Thoughts are `reasoning_content`."""

    prefix, object_type, chunk_type = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, base: Base, resolved: ResolvedPersona, tool_set: ToolSet | None = None, *, wants_usage: bool = False
    ) -> None:
        super().__init__(base, resolved, wants_usage=wants_usage)
        self._tool_set = tool_set
        self._parsers: dict[int, OutputParser] = {}  # by choice
        self._num_calls = Counter[int]()  # by choice

    def first_chunks(self, count: int, usage: Usage) -> str:  # noqa: ARG002 - the last chunk has it
        """The chunks with the role."""
        return "".join(self._chunk(_chunk_choice(index, '{"role":"assistant","content":""}')) for index in range(count))

    async def body(self, deltas: Sequence[OutputDelta], usage: Usage) -> Json:
        """The choices in one object, with the log probabilities of the prompt if the request asks for them."""
        whole = await super().body(deltas, usage)
        if scores := next((delta.scores for delta in deltas if delta.scores), None):
            count = len(scores[-1].top)
            whole["prompt_logprobs"] = await asyncio.to_thread(_render_prompt_logprobs, self._tokenizer, scores, count)
        return whole

    def _render_choice(self, index: int, deltas: Sequence[OutputDelta]) -> Json:
        text, calls = "", list[Json]()
        thoughts = "".join(delta.thought for delta in deltas)
        for delta in deltas:
            for part in self._parse(delta):
                if isinstance(part, str):
                    text += part
                elif isinstance(part, CallStart):
                    self._num_calls[index] += 1
                    calls.append(_call(part.name))
                else:
                    calls[-1]["function"]["arguments"] += part.text
        content = text or (None if calls or thoughts else "")
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "finish_reason": self._finish_reason(deltas[-1]),
            "logprobs": self._chat_logprobs([token for delta in deltas for token in delta.tokens]),
        }

    def _render_delta(self, delta: OutputDelta) -> Sequence[str]:
        index, logprobs = delta.index, self._chat_logprobs(delta.tokens)
        messages = [self._render_part(index, part) for part in self._parse(delta)]
        if delta.thought:
            messages.insert(0, encode({"reasoning_content": delta.thought}))
        if logprobs and not messages:
            messages = [_content("")]
        choices = [_chunk_choice(index, message) for message in messages]
        if logprobs:
            choices[0] = _chunk_choice(index, messages[0], logprobs=encode(logprobs))
        if delta.finish_reason:
            choices.append(_chunk_choice(index, "{}", encode(self._finish_reason(delta))))
        return choices

    def _parse(self, delta: OutputDelta) -> Sequence[ResponsePart]:
        """The content and the calls in a delta."""
        if self._tool_set is None:
            return [delta.text] if delta.text else []
        parser = self._parsers.get(delta.index)
        if parser is None:
            parser = self._parsers[delta.index] = OutputParser(self._tool_set)
        return parser.parse(delta)

    def _render_part(self, index: int, part: ResponsePart) -> str:
        if isinstance(part, str):
            return _content(part)
        if isinstance(part, CallStart):
            self._num_calls[index] += 1
        call = _call(part.name) if isinstance(part, CallStart) else {"function": {"arguments": part.text}}
        return encode({"tool_calls": [{"index": self._num_calls[index] - 1, **call}]})

    def _finish_reason(self, last: OutputDelta) -> str | None:
        return "tool_calls" if last.finish_reason == "stop" and self._num_calls[last.index] else last.finish_reason

    def _chat_logprobs(self, tokens: Sequence[Token]) -> Json | None:
        content = self._logprobs(tokens)
        return None if content is None else {"content": content, "refusal": None}


class CompletionAnswer(ChoicesAnswer):
    """A text completion. Its chunks are text completions too."""

    prefix, object_type, chunk_type = "cmpl-", "text_completion", "text_completion"

    def __init__(
        self, base: Base, resolved: ResolvedPersona, request: CompletionRequest, echoes: Sequence[str] = ()
    ) -> None:
        """`echoes` are the texts of the prompts that the answer repeats."""
        super().__init__(base, resolved, wants_usage=request.wants_usage)
        self._request = request
        self._echoes = {
            number * (request.n or 1) + choice: echo
            for number, echo in enumerate(echoes)
            for choice in range(request.n or 1)
        }  # by choice, until they are written
        self._lengths: dict[int, int] = {}  # in characters so far, by choice

    def _render_choice(self, index: int, deltas: Sequence[OutputDelta]) -> Json:
        text = "".join(delta.text for delta in deltas)
        tokens = [token for delta in deltas for token in delta.tokens]
        rendered = self._render(OutputDelta(index, text, tokens, deltas[-1].finish_reason, scores=deltas[0].scores))
        count = self._request.prompt_logprobs
        if count is not None:
            rendered["prompt_logprobs"] = _render_prompt_logprobs(self._tokenizer, deltas[0].scores, count)
        return rendered

    def _render_delta(self, delta: OutputDelta) -> Sequence[str]:
        return [encode(self._render(delta))]

    def _render(self, delta: OutputDelta) -> Json:
        echo = self._echoes.pop(delta.index, None)
        prompt = () if echo is None else delta.scores
        return {
            "index": delta.index,
            "text": (echo or "") + delta.text,
            "logprobs": self._older_logprobs(delta.index, echo or "", prompt, delta.tokens),
            "finish_reason": delta.finish_reason,
        }

    def _older_logprobs(
        self, index: int, echo: str, prompt: Sequence[PromptToken], answer: Sequence[Token]
    ) -> Json | None:
        """Log probabilities of the tokens of an echoed prompt, and of an answer."""
        count = self._request.logprobs
        tokens: list[PromptToken | Token] = [*prompt, *answer]
        if count is None or not tokens:
            return None
        texts = [self._token_text(token.id) for token in tokens]
        # A special token that the tokenizer puts before the prompt is no part of the echo.
        added = prompt and prompt[0].id in self._tokenizer.all_special_ids and not echo.startswith(texts[0])
        start = -len(texts[0]) if added else self._lengths.get(index, 0)
        *offsets, end = accumulate(map(len, texts), initial=start)
        self._lengths[index] = end
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._token_text(other): logprob for other, logprob in token.top[:count]} | {text: token.logprob}
                if token.logprob is not None
                else None
                for text, token in zip(texts, tokens, strict=True)
            ],
            "text_offset": [max(0, offset) for offset in offsets],
        }

    def _token_text(self, token: int) -> str:
        return token_bytes(self._tokenizer, token).decode(errors="replace")


def _render_usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _chunk_choice(index: int, delta: str, finish_reason: str = "null", logprobs: str = "null") -> str:
    """The choice of a chunk; `delta`, `finish_reason` and `logprobs` are JSON."""
    return f'{{"index":{index},"delta":{delta},"finish_reason":{finish_reason},"logprobs":{logprobs}}}'


def _content(text: str) -> str:
    return f'{{"content":{encode(text)}}}'


def _call(name: str) -> Json:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": ""}}


def _render_prompt_logprobs(
    tokenizer: Any, scores: Sequence[PromptToken], count: int
) -> list[dict[str, dict[str, Any]] | None]:
    """As vLLM writes them: by token id, of the token itself and of the `count` most likely ones."""

    def write(token: int, logprob: float, rank: int) -> dict[str, Any]:
        decoded = token_bytes(tokenizer, token).decode(errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": decoded}

    rendered: list[dict[str, dict[str, Any]] | None] = []
    for score in scores:
        if score.logprob is None:
            rendered.append(None)
            continue
        own = {str(score.id): write(score.id, score.logprob, score.rank)}
        top = {str(token): write(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top[:count], 1)}
        rendered.append(own | {token: written for token, written in top.items() if token not in own})
    return rendered
