"""Runs a request on the engine and sends what it generates, as a stream or in one piece."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message

from masquerade.engine import (
    AnswerFormat,
    AnswerText,
    Event,
    Finished,
    Grammar,
    PromptToken,
    Request,
    ScoredPrompt,
    Token,
)
from masquerade.errors import AnswerTimedOut, ContextTooLong, InvalidValue, MasqueradeError, NotReady
from masquerade.http import errors
from masquerade.http.access import Caller
from masquerade.http.dependencies import read_persona
from masquerade.http.request_log import Usage
from masquerade.http.wire import respond_events
from masquerade.model import Base, ThoughtParser, ThoughtStart, find_dialect, find_thought_start
from masquerade.openai.answers import Answer, OutputDelta
from masquerade.openai.prompt_logprobs import check_scores
from masquerade.openai.prompts import CONTEXT, context_room, tokenise_chat
from masquerade.openai.schemas import ChatRequest, EmbeddingRequest, GenerationRequest
from masquerade.openai.tools import ToolSet, select_tools
from masquerade.service.serving import ResolvedPersona, Serving

DEFAULT_MAX_TOKENS = 2048  # of an answer to a request that sets no limit
PING_SECONDS = 10.0  # of silence, after which a stream sends a comment

Receive = Callable[[], Awaitable[Message]]


async def resolve_persona(
    serving: Serving, request: GenerationRequest | EmbeddingRequest, caller: Caller, http: HTTPRequest
) -> ResolvedPersona:
    """The persona of a request, with its mask on the device. Raises as `Serving.resolve_persona` does, and
    `PersonaForbidden`.

    What reads the prompt itself has a `default_phase` of its own, which goes before the persona's.
    """
    reference = serving.find_reference(request.model, request.persona, await read_persona(http))
    caller.check_reference(reference)
    gone = partial(wait_for_disconnect, http.receive)
    phase = request.persona_phase or (request.default_phase if reference else None)
    return await serving.resolve_persona(reference, request.gamma, phase, gone)


async def respond_chat(
    serving: Serving,
    request: ChatRequest,
    caller: Caller,
    http: HTTPRequest,
    make_answer: Callable[[Base, ResolvedPersona, ToolSet | None], Answer],
    size: int | None = None,
) -> Response:
    """Answer a chat in the form of any API: `make_answer` makes its face.

    `size` is the bytes of all messages and tools; by default those of the body. Raises as `resolve_persona`,
    `tokenise_chat` and `respond` do, with the names of a chat's fields in `param`.
    """
    tokenizer = serving.base.tokenizer
    size = len(await http.body()) if size is None else size
    resolved = await resolve_persona(serving, request, caller, http)
    tool_set = select_tools(request, find_dialect(tokenizer), tokenizer) if request.tools else None
    tools = request.tools if tool_set else None
    options, room = request.template_options, context_room(serving)
    prompt = await tokenise_chat(serving, caller, size, request.messages, tools, room, options)
    thoughts = find_thought_start(tokenizer, prompt, request.continued_text)
    json_format = request.json_format
    if tool_set:
        answer_format = tool_set.answer_format(json_format)
    else:
        answer_format = AnswerFormat([json_format]) if json_format else None
    grammars = None
    if answer_format:
        compile_format = partial(serving.engine.grammars.compile, answer_format, request.n or 1, thoughts)
        grammars = await serving.workers.run(caller.owner, size, compile_format)
    answer = make_answer(serving.base, resolved, tool_set)
    return await respond(serving, resolved, request, caller, [prompt], answer, http.receive, grammars, thoughts)


async def respond(
    serving: Serving,
    resolved: ResolvedPersona,
    request: GenerationRequest,
    caller: Caller,
    prompts: Sequence[list[int]],
    answer: Answer,
    receive: Receive,
    grammars: Sequence[Grammar] | None = None,
    thoughts: ThoughtStart | None = None,
) -> Response:
    """Generate `n` choices for each prompt, and answer with a stream or in one piece. Thoughts that start as `thoughts`
    says are split from the text.

    Raises every error of the request before the first byte is sent: `ContextTooLong` for a prompt that leaves no room
    for an answer, `InvalidValue` for a stop token that does not exist or too many log probabilities, and those of
    `Engine.submit`.
    """
    base = serving.base
    check_scores(request, prompts)
    if unknown := next((token for token in request.stop_token_ids or () if token >= base.vocabulary), None):
        raise InvalidValue(
            f"token id {unknown} is outside of the vocabulary of {base.vocabulary}", param="stop_token_ids"
        )
    requests = [  # one for each choice of each prompt; only `emit` is left to set
        partial(
            Request,
            prompt=prompt,
            max_tokens=_max_tokens(request, base.context, len(prompt)),
            applied=resolved.applied,
            phase=resolved.phase,
            sampling=request.sampling(choice),
            ends=request.ends(base.ends),
            reports_end=request.reports_end,
            prompt_logprobs=request.num_prompt_logprobs,
            min_tokens=request.min_tokens or 0,
            text=AnswerText(
                base.tokenizer,
                request.stops(),
                includes_stop=bool(request.include_stop_str_in_output),
                skips_special=request.skip_special_tokens is not False,
            ),
            grammar=grammars[choice] if grammars else None,
            owner=caller.share,
            priority=caller.priority,
        )
        for prompt in prompts
        for choice in range(request.n or 1)
    ]
    outputs = OutputCollector(serving, requests, caller, thoughts, streams=bool(request.stream))
    caller.record.begin(resolved, lambda: outputs.usage)
    outputs.start()
    if request.stream:
        return respond_events(_stream(outputs, answer), answer.headers)
    return await _respond_whole(outputs, answer, receive)


class OutputCollector:
    """Collects the outputs of the engine's requests that answer one HTTP request. For one event loop."""

    def __init__(
        self,
        serving: Serving,
        requests: Sequence[partial[Request]],
        caller: Caller,
        thoughts: ThoughtStart | None = None,
        *,
        streams: bool,
    ) -> None:
        self._engine, self._notifier = serving.engine, serving.notifier
        self._caller = caller
        self._streams = streams  # otherwise only the end of an answer wakes the event loop
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[int, Event, float]] = deque()  # (index of the answer, event, time of arrival)
        self._changed = asyncio.Event()
        self._ping_due = False
        self.disconnected = False
        self._parsers = [ThoughtParser(thoughts) for _ in requests] if thoughts else []
        self._requests = [make(emit=partial(self._receive, index)) for index, make in enumerate(requests)]

    @property
    def count(self) -> int:
        """The number of answers."""
        return len(self._requests)

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt with several choices counts once."""
        prompts = {id(request.prompt): request for request in reversed(self._requests)}.values()
        return Usage(
            sum(len(request.prompt) for request in prompts),
            sum(request.num_output_tokens for request in self._requests),
            sum(request.num_cached for request in prompts),
        )

    def start(self, began: float | None = None) -> None:
        """Submit to the engine. If that raises, no tokens are counted and no mask stays referenced.

        The time limit counts from `began`, of the loop's clock; by default from now.
        """
        try:
            self._engine.submit(*self._requests)
        except MasqueradeError:
            self._requests.clear()
            raise
        self._last_output = self._loop.time()
        self._deadline = (self._last_output if began is None else began) + self._caller.answer_seconds
        self._check_time()

    def disconnect(self) -> None:
        """End `deltas`, because the client has disconnected."""
        self.disconnected = True
        self._changed.set()

    def cancel(self) -> None:
        """Cancel what the engine still runs. Has no effect after the end."""
        self._timer.cancel()
        for request in self._requests:
            if not request.finished:
                self._engine.cancel(request)

    def fail(self, failure: Exception) -> MasqueradeError:
        """The error to send for a failure; it is logged with the request."""
        error = errors.translate(failure)
        self._caller.record.fail(error)
        return error

    def _receive(self, index: int, event: Event) -> None:
        """Called on the engine's thread."""
        self._queue.append((index, event, perf_counter()))
        if self._streams or isinstance(event, Finished):
            self._notifier.notify(self._changed)

    def _check_time(self) -> None:
        """Handle the deadline and pings, and schedule the next check."""
        now = self._loop.time()
        if now >= self._deadline:
            limit = f"{self._caller.answer_seconds:g} s"
            error = AnswerTimedOut(f"the answer was not finished within {limit}, which is the limit")
            self._queue.append((0, Finished("error", error), perf_counter()))
            self._changed.set()
            return
        if now >= self._last_output + PING_SECONDS:
            self._last_output, self._ping_due = now, True
            self._changed.set()
        self._timer = self._loop.call_at(min(self._deadline, self._last_output + PING_SECONDS), self._check_time)

    async def deltas(self) -> AsyncIterator[list[OutputDelta]]:
        """New output, in order; the last delta of each answer has the finish reason.

        An empty list means that a ping is due. Raises the error that ended an answer early.
        """
        pending: list[list[Token]] = [[] for _ in self._requests]  # tokens without text of their own yet
        scores: dict[int, Sequence[PromptToken]] = {}  # of prompts, for the first delta of their answers
        unfinished, failure = self.count, None
        while unfinished and not failure and not self.disconnected:
            self._last_output, self._ping_due = self._loop.time(), False
            await self._changed.wait()
            self._changed.clear()
            failure = self._caller.key_error()
            deltas = []
            while self._queue and not failure:
                index, event, arrived = self._queue.popleft()
                finish_reason: str | None = None
                stop: str | None = None
                match event:
                    case ScoredPrompt():
                        scores[index] = event.tokens
                        continue
                    case Token():
                        self._caller.record.add_token(index, arrived)
                        pending[index].append(event)
                    case Finished("stop" | "length"):
                        finish_reason, stop, unfinished = event.reason, event.stop, unfinished - 1
                        self._caller.record.end_answer(finish_reason)
                    case Finished(_, error):
                        failure = error or NotReady("the server is stopping")
                thought, text = self._split(index, event.text, last=finish_reason is not None)
                if text or thought or finish_reason:
                    prompt = scores.pop(index, ())
                    deltas.append(OutputDelta(index, text, pending[index], finish_reason, stop, thought, prompt))
                    pending[index] = []
            if deltas or self._ping_due:
                yield deltas
        if failure:
            self._caller.record.fail(failure)
            raise failure

    def _split(self, index: int, text: str, *, last: bool) -> tuple[str, str]:
        """What a text adds to the thoughts of an answer, and to its content."""
        return self._parsers[index].push(text, last=last) if self._parsers else ("", text)


async def _respond_whole(outputs: OutputCollector, answer: Answer, receive: Receive) -> Response:
    """The answers in one piece."""
    deltas = await collect_deltas(outputs, receive)
    if outputs.disconnected:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(await answer.body(deltas, outputs.usage), headers=answer.headers)


async def collect_deltas(outputs: OutputCollector, receive: Receive) -> list[OutputDelta]:
    """All output; a disconnect of the client ends it and cancels the rest. Raises as `OutputCollector.deltas`."""
    watch = asyncio.create_task(_watch(receive, outputs))
    try:
        return [delta async for deltas in outputs.deltas() for delta in deltas]
    finally:
        outputs.cancel()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def wait_for_disconnect(receive: Receive) -> None:
    """Raises `ClientDisconnect` when the client disconnects. Call it after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _watch(receive: Receive, outputs: OutputCollector) -> None:
    try:
        await wait_for_disconnect(receive)
    except ClientDisconnect:
        outputs.disconnect()


async def _stream(outputs: OutputCollector, answer: Answer) -> AsyncIterator[str]:
    """Server-sent events; the framework closes the iterator when the client disconnects."""
    try:
        yield answer.first_chunks(outputs.count, outputs.usage)
        async for deltas in outputs.deltas():
            yield "".join(map(answer.chunks, deltas)) if deltas else answer.ping
        yield await answer.last_chunks(outputs.usage)
    except Exception as failure:  # the status has been sent
        yield answer.error_chunk(outputs.fail(failure))
    finally:
        outputs.cancel()


def _max_tokens(request: GenerationRequest, context: int, prompt: int) -> int:
    """The limit of a request; without one `DEFAULT_MAX_TOKENS`, or the minimum if that is more.

    The default, and with `ends_at_context` every limit, is cut to what the prompt leaves of the context.
    A small model may repeat itself forever. Without the limit, its answer would take the whole context, which is longer
    than the time limit of answers allows. Raises `ContextTooLong` if the prompt leaves nothing.
    """
    limit = request.max_new_tokens()
    if limit is not None and not request.ends_at_context:
        return limit
    if prompt >= context:
        raise ContextTooLong(
            f"{CONTEXT.format(context)} However, your messages resulted in {prompt} tokens, which leaves no room for "
            "an answer.",
            param="messages",
            tokens=prompt,
        )
    return min(context - prompt, limit or max(DEFAULT_MAX_TOKENS, request.min_tokens or 0))
