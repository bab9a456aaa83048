"""The engine: one thread that owns the model and steps many requests through it.

Knows admission, the loop and the isolation of faults. Refuses to know what the tokens mean.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from masquerade.engine import attention, graphs
from masquerade.engine.background import BackgroundTasks
from masquerade.engine.batch import pack
from masquerade.engine.block_manager import BlockManager
from masquerade.engine.counts import Counts, Occupancy
from masquerade.engine.kv_cache import KVCache, bytes_per_position
from masquerade.engine.prefix import BLOCK_SIZE, Salts
from masquerade.engine.request import Request
from masquerade.engine.sampler import SampledToken, Sampler
from masquerade.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from masquerade.engine.structured import Grammars
from masquerade.errors import ContextTooLong, InvalidValue, NotReady, Overloaded, StepFailed
from masquerade.model import Base, Route, Span, make_route

_log = logging.getLogger(__name__)
T = TypeVar("T")

BESIDE_DECODES = {"cpu": 32}  # where arithmetic is scarce, running answers would wait long for a new prompt


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine. `cache_bytes` bounds the key-value cache; less is taken where less can ever be used."""

    max_running: int = 32
    max_waiting: int = 256
    max_batch_tokens: int = 512
    cache_bytes: int = 2**30
    beside_decodes: int | None = None  # prompt tokens in a step that also decodes; by default the device decides
    hung_seconds: float = 120.0  # a step that takes longer is reported by `ready`

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "cache_bytes", "beside_decodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValue(f"{name} is {value}; it must be at least 1")
        if self.max_batch_tokens < self.max_running:
            raise InvalidValue(f"max_batch_tokens ({self.max_batch_tokens}) is below max_running ({self.max_running})")


class Engine:
    """Continuous batching over a base model whose masks are attached (`MaskManager.attach`).

    `submit` and `cancel` may be called from any thread. Between `start` and `stop` a worker thread owns the model;
    without it, `step` may be called by hand.
    """

    def __init__(
        self, base: Base, config: EngineConfig | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.base = base
        self.config = config or EngineConfig()
        self.counts = Counts()
        self.on_step: Callable[[], None] = lambda: None  # called after each step, on its thread; must return at once
        self.grammars = Grammars(base.tokenizer, base.vocabulary, base.ends)
        self._clock = clock
        self._salts = Salts(base.fingerprint)
        self._cache = KVCache(base.model.config, self._count_pages(), base.dtype, base.device)
        self._graphs = graphs.prepare(base, self._cache, self.config.max_running)
        self._attention = base.model.config._attn_implementation
        base.model.set_attn_implementation(attention.NAME)
        self._inbox: deque[Request] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = False
        self._stepping_since: float | None = None
        self._broken = False  # the last step failed for everybody in it
        self._arrivals = 0
        self._unfinished: set[Request] = set()  # taken from the inbox
        self._background = BackgroundTasks()
        self._reset()

    def start(self) -> None:
        """Start the worker thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self, grace: float) -> None:
        """Take no more requests, let what is there finish for `grace` seconds, cancel the rest. The thread goes on, to
        tell them and to do errands.
        """
        with self._wake:
            self._draining = True
            if self._thread:
                self._wake.wait_for(lambda: not self._busy(), grace)
            for request in [*self._unfinished, *self._inbox]:
                request.cancelled = True
            self._wake.notify_all()

    def stop(self, grace: float = 0.0) -> None:
        """Drain, end the worker thread, give the model its own attention back."""
        self.drain(grace)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread:
            self._thread.join()
        self._background.abandon(NotReady("the server is stopping"))
        self.step()
        self.base.model.set_attn_implementation(self._attention)

    @property
    def ready(self) -> bool:
        """Whether the worker thread is there to take requests and gets ahead."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """Why the engine is not ready, if it is not."""
        since = self._stepping_since
        if self._thread is None or not self._thread.is_alive():
            return "the engine is not running"
        if self._draining:
            return "the engine is stopping"
        if since is not None and (seconds := self._clock() - since) > self.config.hung_seconds:
            return f"a step has been running for {seconds:.0f} s"
        return "the last step failed for all of its requests" if self._broken else None

    @property
    def occupancy(self) -> Occupancy:
        """What is held right now, as far as it can be told without disturbing the worker thread."""
        pool, running = self._pool, list(self._scheduler.running)
        idle, free = pool.idle, pool.free
        return Occupancy(
            waiting=len(self._inbox) + len(self._scheduler.waiting),
            running=len(running),
            masks=len({applied.mask.digest for request in running if (applied := request.applied)}),
            pages_held=pool.count - free,
            pages_kept=idle,
            pages_blank=free - idle,
        )

    def submit(self, *requests: Request) -> None:
        """Queue requests, all of them or none, or refuse at once.

        Raises `ContextTooLong` and `InvalidValue` for what can never run, `Overloaded` if the queue is full, `NotReady`
        when the engine is stopping.
        """
        for request in requests:
            self._check(request)
            request.link(self._salts)
        with self._wake:
            if self._draining:
                raise NotReady("the server is stopping")
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting and waiting + len(requests) > self.config.max_waiting:
                raise Overloaded(f"{waiting} requests are waiting, which is the limit; try again later")
            for request in requests:
                self._arrivals += 1
                request.arrival = self._arrivals
            self._inbox.extend(requests)
            self._wake.notify_all()

    def cancel(self, request: Request) -> None:
        """End a request before its next step. Harmless if it has finished."""
        request.cancelled = True
        with self._wake:
            self._wake.notify_all()

    def run_background(self, work: Callable[[], T]) -> Future[T]:
        """Have a small piece of other work done on the engine's thread, between steps; see `Errands`.

        Raises `NotReady` when there is no such thread (any more).
        """
        with self._wake:
            if self._thread is None or self._stopping:
                raise NotReady("the engine is not running")
            outcome = self._background.ask(work)
            self._wake.notify_all()
        return outcome

    def step(self) -> bool:
        """Run one forward pass for all requests that are due; False if there was nothing to do.

        A pass that fails is tried again in halves, down to the request that makes it fail, which ends with
        `StepFailed`. A fault anywhere else in the step ends all requests that were running, and the cache starts anew.
        """
        try:
            return self._step()
        except Exception as error:
            self._recover(error)
            return True
        finally:
            self._tell()

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """Run requests to their end on the calling thread; the answers' token ids. Only without `start`."""
        requests = list(requests)
        for request in requests:
            self.submit(request)
        while self.step():
            pass
        return [request.ids[len(request.prompt) :] for request in requests]

    def _step(self) -> bool:
        with self._wake:
            if self._inbox:
                self._unfinished.update(self._inbox)
                self._scheduler.enter(self._inbox)
                self._inbox.clear()
        chunks = self._scheduler.schedule()
        self._cache.clear(self._scheduler.fresh)
        for source, target, places in self._scheduler.copies:
            self._cache.copy(source, target, places)
        if chunks:
            self._settle(chunks, self._attempt(chunks))
        for request in [request for request in self._unfinished if request.finished]:
            self._unfinished.discard(request)
        if not self._unfinished:
            self._find_route([])  # the last one's masks may go
        return bool(chunks)

    def _tell(self) -> None:
        """Whoever fails to hear that a step is over must not stop the next one."""
        try:
            self.on_step()
        except Exception:
            _log.exception("nobody heard that a step is over")

    def _attempt(self, chunks: Sequence[Chunk]) -> list[SampledToken | None]:
        """The chunks' picks, of those that sample; what fails alone is retired."""
        try:
            picks = self._forward(chunks)
            self._broken = False
        except Exception as error:
            self.counts.failures += 1
            if len(chunks) > 1:
                _log.exception("a forward pass of %d requests failed; trying each half", len(chunks))
                half = len(chunks) // 2
                return self._attempt(chunks[:half]) + self._attempt(chunks[half:])
            _log.exception("a forward pass of one request failed; it ends with an error")
            self._broken = True
            self._fail(chunks[0].request, f"the forward pass failed: {error}")
            return [None]
        if len(picks) == len(chunks):
            return [*picks]
        sampled = iter(picks)
        return [next(sampled) if chunk.samples else None for chunk in chunks]

    def _settle(self, chunks: Sequence[Chunk], picks: Sequence[SampledToken | None]) -> None:
        """Enter what a pass computed."""
        scheduler = self._scheduler
        for chunk, pick in zip(chunks, picks, strict=True):
            request = chunk.request
            if request.seat < 0:  # failed in this step
                continue
            if pick is None:
                scheduler.complete(chunk)
                continue
            token, logprob, top = pick
            if token is None:
                self._pool.forget(request.pages)  # a later one must not find what may have made it so
                self._fail(request, "the model's output is not a number, or nothing may follow")
                continue
            scheduler.complete(chunk)
            self.counts.sampled += 1
            try:
                reason = request.accept(token, logprob, top)
            except Exception as error:
                _log.exception("a token cannot be added to its answer, which ends with an error")
                self._fail(request, f"the answer cannot go on: {error}")
            else:
                if reason:
                    scheduler.retire(request, reason)

    def _fail(self, request: Request, message: str) -> None:
        self._scheduler.retire(request, "error", StepFailed(message))

    def _recover(self, error: Exception) -> None:
        """Throw away whatever a fault may have left half done; requests that had not begun keep their place."""
        _log.error("a step failed outside of the forward pass; all running requests end", exc_info=error)
        waiting = sorted((one for one in self._unfinished if not one.started), key=lambda one: one.arrival)
        lost = [one for one in self._unfinished if one.started]
        queued = set(waiting)
        while self._inbox and self._inbox[0] in queued:
            self._inbox.popleft()  # was being taken over when the step failed
        self._reset()
        self._unfinished = queued
        for request in waiting:
            request.lose()  # it may have been half admitted
        self._scheduler.enter(waiting)
        for request in lost:
            request.finish("error", StepFailed(f"the step failed: {error}"))

    def _reset(self) -> None:
        self._pool = BlockManager(self._cache.count)
        limits = SchedulerConfig(
            self.config.max_running,
            self.config.max_batch_tokens,
            self.config.beside_decodes or BESIDE_DECODES.get(self.base.device.type, self.config.max_batch_tokens),
        )
        self._scheduler = Scheduler(self._pool, limits, self.counts, min(self.base.context, self._cache.positions))
        self._sampler = Sampler()
        self._spans: list[Span] = []
        self._route = Route(())

    @torch.inference_mode()
    def _forward(self, chunks: Sequence[Chunk]) -> list[SampledToken]:
        logits = self._graphs.run(chunks, self._scheduler.table) if self._graphs else None
        if logits is None:
            logits = self._run_model(chunks)
        self.counts.steps += 1
        self.counts.computed += sum(chunk.stop - chunk.start for chunk in chunks)
        return self._sampler.sample(logits, [chunk.request for chunk in chunks if chunk.samples])

    def _run_model(self, chunks: Sequence[Chunk]) -> Tensor:
        batch = pack(chunks, self._scheduler.table, self._cache, self._find_route)
        logits: Tensor = self.base.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=attention.NO_MASK,
            use_cache=False,
            logits_to_keep=batch.sampled,
            route=batch.route,
            plan=batch.plan,
        ).logits[0]  # [samples, vocabulary]
        return logits

    def _find_route(self, spans: list[Span]) -> Route:
        """While the same rows wear the same, step after step, their route is kept."""
        if spans != self._spans:
            self._spans, self._route = spans, make_route(spans, self.base.device)
        return self._route

    def _run(self) -> None:
        while True:
            with self._wake:
                self._stepping_since = None
                if not self._busy():
                    self._wake.notify_all()  # whoever waits for the engine to be empty
                self._wake.wait_for(lambda: self._stopping or self._busy() or self._background)
                if self._stopping:
                    return
                self._stepping_since = self._clock()
            if self.step():
                self._background.pass_step()
            self._stepping_since = None  # an errand may take its time
            self._background.do_due(serving=self._busy())

    def _busy(self) -> bool:
        return bool(self._inbox or self._unfinished)

    def _count_pages(self) -> int:
        """As many as the budget affords, but no more than can ever be of use."""
        affordable = (
            self.config.cache_bytes // bytes_per_position(self.base.model.config, self.base.dtype) // BLOCK_SIZE
        )
        return max(1, min(self.config.max_running * -(-self.base.context // BLOCK_SIZE) * 2, affordable))

    def _check(self, request: Request) -> None:
        context, prompt, vocabulary = self.base.context, len(request.prompt), self.base.vocabulary
        if request.max_tokens < 1:
            raise InvalidValue(f"max_tokens is {request.max_tokens}; it must be at least 1", param="max_tokens")
        if not 0 <= request.min_tokens <= request.max_tokens:
            raise InvalidValue(
                f"min_tokens is {request.min_tokens}; it must be between 0 and max_tokens, which is "
                f"{request.max_tokens}",
                param="min_tokens",
            )
        if not request.prompt:
            raise InvalidValue("the prompt is empty", param="messages")
        for param, tokens in (("messages", request.prompt), ("logit_bias", request.sampling.bias)):
            strange = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if strange is not None:
                raise InvalidValue(f"token id {strange} is outside of the vocabulary of {vocabulary}", param=param)
        for limit, given in ((context, ""), (self._cache.positions, " with the cache it was given")):
            if request.reach > limit:
                raise ContextTooLong(
                    f"This model's maximum context length is {limit} tokens{given}. However, {request.reach} were "
                    f"requested ({prompt} in the messages, {request.max_tokens} in the completion).",
                    param="messages",
                    tokens=prompt,
                )
