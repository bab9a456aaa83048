"""Answers in the making, seen from the event loop: the same for chats and for completions.

Knows how the engine's events become a stream or a whole, and what happens when the client goes away. Refuses to know
what an answer looks like.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message

from masquerade.engine import AnswerText, Event, Finished, Grammar, Request, Token
from masquerade.errors import AnswerTimedOut, ContextTooLong, MasqueradeError, NotReady
from masquerade.http import errors
from masquerade.http.access import Caller
from masquerade.http.request_log import Usage
from masquerade.http.wire import sse
from masquerade.openai.answers import Answer, ChoiceDelta
from masquerade.openai.prompts import CONTEXT
from masquerade.openai.schemas import GenerationRequest
from masquerade.service.serving import ResolvedPersona, Serving

PING_SECONDS = 10.0  # silence after which a stream says that it is alive

_STREAMING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def plan(
    serving: Serving,
    resolved: ResolvedPersona,
    asked: GenerationRequest,
    caller: Caller,
    prompts: Sequence[list[int]],
    grammars: Sequence[Grammar] | None = None,
) -> GenerationStream:
    """The requests to the engine that answer what was asked: for each prompt so many choices as are wanted.

    Raises `ContextTooLong` for a prompt that leaves no room for an answer.
    """
    base, count = serving.base, asked.n or 1
    requests = [
        partial(
            Request,
            prompt=prompt,
            max_tokens=asked.limit() or _rest(base.context, len(prompt)),
            applied=resolved.applied,
            phase=resolved.phase,
            sampling=asked.sampling(choice),
            ends=base.ends,
            min_tokens=asked.min_tokens or 0,
            text=AnswerText(base.tokenizer, asked.stops()),
            grammar=grammars[choice] if grammars else None,
            owner=caller.owner,
        )
        for prompt in prompts
        for choice in range(count)
    ]
    generation = GenerationStream(serving, requests, caller, streams=bool(asked.stream))
    caller.record.begin(resolved, lambda: generation.usage)
    return generation


class GenerationStream:
    """The answers to one request of a client."""

    def __init__(
        self, serving: Serving, requests: Sequence[partial[Request]], caller: Caller, *, streams: bool
    ) -> None:
        self._engine, self._notifier = serving.engine, serving.notifier
        self._caller = caller
        self._streams = streams  # else nobody is told before an answer has ended
        self._loop = asyncio.get_running_loop()
        self._box: deque[tuple[int, Event, float]] = deque()  # what came for which answer, and when
        self._filled = asyncio.Event()
        self._silent = False
        self.left = False  # nobody waits any more
        self._requests = [make(emit=partial(self._receive, index)) for index, make in enumerate(requests)]

    @property
    def count(self) -> int:
        """How many answers there will be."""
        return len(self._requests)

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many answers it gets."""
        prompts = {id(request.prompt): request for request in reversed(self._requests)}.values()
        return Usage(
            sum(len(request.prompt) for request in prompts),
            sum(request.num_output_tokens for request in self._requests),
            sum(request.num_cached for request in prompts),
        )

    def start(self) -> None:
        """Submit to the engine; raises its refusals, after which there is nothing to pay for and no mask is held."""
        try:
            self._engine.submit(*self._requests)
        except MasqueradeError:
            self._requests.clear()
            raise
        self._heard = self._loop.time()
        self._deadline = self._heard + self._caller.answer_seconds
        self._tick()

    def leave(self) -> None:
        """Nobody waits for what is still to come: `pieces` ends."""
        self.left = True
        self._filled.set()

    def cancel(self) -> None:
        """Free the places in the batch. Harmless after the end."""
        self._timer.cancel()
        for request in self._requests:
            if not request.finished:
                self._engine.cancel(request)

    def fail(self, error: Exception) -> MasqueradeError:
        """An answer that has begun comes to this end."""
        told = errors.translate(error)
        self._caller.record.fail(told)
        return told

    def _receive(self, index: int, event: Event) -> None:
        """Called on the engine's thread."""
        self._box.append((index, event, perf_counter()))
        if self._streams or isinstance(event, Finished):
            self._notifier.notify(self._filled)

    def _tick(self) -> None:
        """Notice that the time is up, or that nothing has come for a while; if not, look again when it may be so."""
        now = self._loop.time()
        if now >= self._deadline:
            self._expire()
            return
        if now >= self._heard + PING_SECONDS:
            self._heard, self._silent = now, True
            self._filled.set()
        self._timer = self._loop.call_at(min(self._deadline, self._heard + PING_SECONDS), self._tick)

    def _expire(self) -> None:
        error = AnswerTimedOut(
            f"the answer was not finished within {self._caller.answer_seconds:g} s, which is the limit"
        )
        self._box.append((0, Finished("error", error), perf_counter()))
        self._filled.set()

    async def pieces(self) -> AsyncIterator[list[ChoiceDelta]]:
        """What is new since the last time, in order; the last piece of each answer has the reason.

        An empty list says that nothing has come for a while. Raises what ended an answer early.
        """
        told: list[list[Token]] = [[] for _ in self._requests]  # tokens whose text was held back
        left, failure = self.count, None
        while left and not failure and not self.left:
            self._heard, self._silent = self._loop.time(), False
            await self._filled.wait()
            self._filled.clear()
            failure = self._caller.key_error()
            pieces = []
            while self._box and not failure:
                index, event, came = self._box.popleft()
                reason: str | None = None
                match event:
                    case Token():
                        self._caller.record.add_token(index, came)
                        told[index].append(event)
                    case Finished("stop" | "length"):
                        reason, left = event.reason, left - 1
                        self._caller.record.end_answer(reason)
                    case Finished(_, error):
                        failure = error or NotReady("the server is stopping")
                if event.text or reason:
                    pieces.append(ChoiceDelta(index, event.text, told[index], reason))
                    told[index] = []
            if pieces or self._silent:
                yield pieces
        if failure:
            self._caller.record.fail(failure)
            raise failure


Receive = Callable[[], Awaitable[Message]]


async def respond(generation: GenerationStream, answer: Answer, asked: GenerationRequest, receive: Receive) -> Response:
    """Start, and answer as it was asked. Every refusal comes before the first byte."""
    generation.start()
    if asked.stream:
        events = _stream(generation, answer, asked.wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={**_STREAMING, **answer.headers})
    return await _whole(generation, answer, receive)


async def _whole(generation: GenerationStream, answer: Answer, receive: Receive) -> Response:
    """The answers in one piece; the client's going away cancels them."""
    watch = asyncio.create_task(_watch(receive, generation))
    try:
        pieces = [piece async for pieces in generation.pieces() for piece in pieces]
    finally:
        generation.cancel()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    if generation.left:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(answer.whole(pieces, generation.usage), headers=answer.headers)


async def departure(receive: Receive) -> None:
    """Raises `ClientDisconnect` when the client goes away. To be called when the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _watch(receive: Receive, generation: GenerationStream) -> None:
    """The client's going away ends a generation."""
    try:
        await departure(receive)
    except ClientDisconnect:
        generation.leave()


async def _stream(generation: GenerationStream, answer: Answer, wants_usage: bool) -> AsyncIterator[str]:
    """Chunks; the server's framework closes the iterator when the client goes away."""
    try:
        yield "".join(map(answer.opening, range(generation.count)))
        async for pieces in generation.pieces():
            yield "".join(map(answer.chunks, pieces)) if pieces else ": ping\n\n"
        if wants_usage:
            yield answer.usage_chunk(generation.usage)
        yield sse("[DONE]")
    except Exception as error:  # the status has been sent
        yield sse(errors.body(generation.fail(error)))
    finally:
        generation.cancel()


def _rest(context: int, prompt: int) -> int:
    """What an answer without a limit may take: the rest of the context."""
    if prompt >= context:
        raise ContextTooLong(
            f"{CONTEXT.format(context)} However, your messages resulted in {prompt} tokens, which leaves no room for "
            "an answer.",
            param="messages",
            tokens=prompt,
        )
    return context - prompt
