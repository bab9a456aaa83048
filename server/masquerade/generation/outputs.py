"""Collects what the engine generates for a request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import Message

from masquerade.engine import Event, Finished, PromptToken, Request, ScoredPrompt, Token
from masquerade.errors import AnswerTimedOut, MasqueradeError, NotReady
from masquerade.generation.answers import OutputDelta
from masquerade.http import errors
from masquerade.http.access import Caller
from masquerade.http.request_log import Usage
from masquerade.model import ThoughtParser, ThoughtStart
from masquerade.service.serving import Serving

PING_SECONDS = 10.0  # of silence, after which a stream sends a comment

Receive = Callable[[], Awaitable[Message]]


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
        self._timer: asyncio.TimerHandle | None = None
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
        if self._timer is not None:
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
