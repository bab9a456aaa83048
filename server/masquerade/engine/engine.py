"""The engine: one thread that owns the model and steps many requests through it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from masquerade.engine import attention
from masquerade.engine.background import BackgroundTasks
from masquerade.engine.batch import pack
from masquerade.engine.block_manager import BlockManager
from masquerade.engine.counts import Counts, Occupancy
from masquerade.engine.cuda import graphs
from masquerade.engine.embedding import collect_states
from masquerade.engine.kv_cache import KVCache, bytes_per_position, count_blocks
from masquerade.engine.prefix import BLOCK_SIZE, Salts
from masquerade.engine.prompt_logprobs import score_tokens
from masquerade.engine.request import MAX_LOGPROBS, Request
from masquerade.engine.sampler import SampledRow, SampledToken, Sampler
from masquerade.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from masquerade.engine.structured import Grammars
from masquerade.errors import ContextTooLong, InvalidValue, NotReady, Overloaded, StepFailed
from masquerade.model import Base, Route, Span, find_stages, make_route

_log = logging.getLogger(__name__)
T = TypeVar("T")

PREFILL_BUDGETS = {"cpu": 32}  # by device: where compute is scarce, a long prompt would delay running answers


DRAFT_ROWS = {"cpu": 32}  # by device: positions that a step computes in little more time than one


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine. `cache_bytes` bounds the KV cache, which is smaller if it could never be filled."""

    max_running: int = 32
    max_waiting: int = 256
    max_batch_tokens: int = 512
    cache_bytes: int = 2**30
    prefill_budget: int | None = None  # prompt tokens of a step that also decodes; None: by device
    speculate: bool | None = None  # whether answers are drafted by prompt lookup; None: by device
    hung_seconds: float = 120.0  # a longer step makes the engine unready

    def __post_init__(self) -> None:
        for name in ("max_running", "max_waiting", "cache_bytes", "prefill_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValue(f"{name} is {value}; it must be at least 1")
        if self.max_batch_tokens < self.max_running:
            raise InvalidValue(f"max_batch_tokens ({self.max_batch_tokens}) is below max_running ({self.max_running})")


class Engine:
    """Continuous batching over a base model whose masks are attached (`MaskManager.attach`).

    `submit` and `cancel` may be called from any thread. Between `start` and `stop` a worker thread owns the model;
    without it, `step` may be called directly.
    """

    def __init__(
        self, base: Base, config: EngineConfig | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.base = base
        self.config = config or EngineConfig()
        self.counts = Counts()
        self.on_step: Callable[[], None] = lambda: None  # called after each step, on its thread; must not block
        self.grammars = Grammars(base.tokenizer, base.vocabulary, base.ends)
        self._clock = clock
        self._salts = Salts(base.fingerprint)
        blocks = self._count_blocks()
        self._caches = [
            KVCache(base.model.config, blocks, base.dtype, stage.device, stage.layers)
            for stage in find_stages(base.model)
        ]
        self._cache = self._caches[0]
        self._graphs = graphs.prepare(base, self._cache, self.config.max_running)
        self._attention = base.model.config._attn_implementation
        base.model.set_attn_implementation(attention.NAME)
        self._inbox: deque[Request] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = False
        self._step_started: float | None = None
        self._broken = False  # the last step failed for all of its requests
        self._succeeded = False  # a forward pass of the step did
        self._arrivals = 0
        self._unfinished: set[Request] = set()  # taken from the inbox
        self._background = BackgroundTasks()
        self._spans: list[Span] = []
        self._route = Route(())
        self._reset()

    def start(self) -> None:
        """Start the worker thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def drain(self, grace: float) -> None:
        """Refuse new requests, let the others run for `grace` seconds, and cancel what is left, background requests at
        once. The worker thread goes on: it ends the cancelled requests and runs background tasks.
        """
        with self._wake:
            self._draining = True
            for request in [*self._unfinished, *self._inbox]:
                request.cancelled = request.cancelled or request.is_background
            self._wake.notify_all()
            if self._thread:
                self._wake.wait_for(lambda: not self._busy(), grace)
            for request in [*self._unfinished, *self._inbox]:
                request.cancelled = True
            self._wake.notify_all()

    def stop(self, grace: float = 0.0) -> None:
        """Drain, end the worker thread, and restore the model's attention."""
        self.drain(grace)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread:
            self._thread.join()
        self._background.fail_all(NotReady("the server is stopping"))
        self.step()
        self.base.model.set_attn_implementation(self._attention)

    @property
    def ready(self) -> bool:
        """Whether the worker thread takes requests and makes progress."""
        return self.unready_reason is None

    @property
    def is_draining(self) -> bool:
        """Whether the engine takes no more requests, as it is to be stopped."""
        return self._draining

    @property
    def max_length(self) -> int:
        """Most tokens of a request and its answer: those of the context, or fewer if the cache has less room."""
        return min(self.base.context, self._cache.positions)

    @property
    def unready_reason(self) -> str | None:
        """Why the engine is not ready; None if it is."""
        if self._draining and self._is_running:
            return "the engine is stopping"
        return self.failure

    @property
    def failure(self) -> str | None:
        """Why the engine makes no progress: its thread ended, a step hangs or failed; None if it does."""
        started = self._step_started
        if not self._is_running:
            return "the engine is not running"
        if started is not None and (seconds := self._clock() - started) > self.config.hung_seconds:
            return f"a step has been running for {seconds:.0f} s"
        return "the last step failed for all of its requests" if self._broken else None

    @property
    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def occupancy(self) -> Occupancy:
        """The current numbers, read without a lock; they may be from different moments of a step."""
        blocks, running = self._block_manager, list(self._scheduler.running)
        cached, free = blocks.num_cached, blocks.num_free
        return Occupancy(
            waiting=len(self._inbox) + len(self._scheduler.waiting),
            running=len(running),
            masks=len({applied.mask.digest for request in running if (applied := request.applied)}),
            blocks_used=blocks.num_blocks - free,
            blocks_cached=cached,
            blocks_empty=free - cached,
        )

    def submit(self, *requests: Request) -> None:
        """Queue all of the requests or none.

        Raises `ContextTooLong` and `InvalidValue` for a request that can never run, `Overloaded` if the queue is full,
        `NotReady` if the engine is stopping.
        """
        for request in requests:
            self._check(request)
            request.prepare_hashes(self._salts)
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
        """End a request before its next step. Has no effect if it has finished."""
        request.cancelled = True
        with self._wake:
            self._wake.notify_all()

    def run_background(self, work: Callable[[], T]) -> Future[T]:
        """Run a short function on the worker thread, between steps; see `BackgroundTasks`.

        Raises `NotReady` without a worker thread.
        """
        with self._wake:
            if self._thread is None or self._stopping:
                raise NotReady("the engine is not running")
            outcome = self._background.submit(work)
            self._wake.notify_all()
        return outcome

    def generate(self, requests: Iterable[Request]) -> list[list[int]]:
        """Run requests to their end on the calling thread; the token ids of the answers. Only without `start`."""
        requests = list(requests)
        for request in requests:
            self.submit(request)
        while self.step():
            pass
        return [request.ids[len(request.prompt) :] for request in requests]

    def step(self) -> bool:
        """Run one forward pass for all scheduled requests; False if there are none.

        If the pass fails, each half is run again, down to the request that makes it fail, which ends with `StepFailed`.
        A failure anywhere else ends all requests that have started and resets the cache.
        """
        try:
            return self._step()
        except Exception as error:
            self._recover(error)
            return True
        finally:
            self._emit_step()

    def _step(self) -> bool:
        self._take_inbox()
        chunks = self._scheduler.schedule()
        for cache in self._caches:
            cache.zero(self._scheduler.new_blocks)
            for copied in self._scheduler.copies:
                cache.copy(*copied)
        if chunks:
            self._succeeded = False
            sampled = self._attempt(chunks)
            self._broken = not self._succeeded
            self._process_output(chunks, sampled)
        for request in [request for request in self._unfinished if request.finished]:
            self._unfinished.discard(request)
        if not self._unfinished:
            self._release_masks()
        return bool(chunks)

    def _take_inbox(self) -> None:
        with self._wake:
            if self._inbox:
                self._unfinished.update(self._inbox)
                self._scheduler.add(self._inbox)
                self._inbox.clear()

    def _attempt(self, chunks: Sequence[Chunk]) -> list[list[SampledToken]]:
        """Run the chunks, and retire those that fail alone. The tokens of each chunk, one for each sampled position."""
        try:
            tokens = self._forward(chunks)
            self._succeeded = True
        except Exception as error:
            self.counts.failures += 1
            if len(chunks) > 1:
                _log.exception("a forward pass of %d requests failed; trying each half", len(chunks))
                half = len(chunks) // 2
                return self._attempt(chunks[:half]) + self._attempt(chunks[half:])
            if draft := chunks[0].draft:
                _log.exception("a forward pass of one request with a draft failed; trying without the draft")
                return self._attempt([chunks[0]._replace(stop=chunks[0].stop - len(draft), draft=())])
            _log.exception("a forward pass of one request failed; it ends with an error")
            self._fail(chunks[0].request, f"the forward pass failed: {error}")
            return [[]]
        sampled = iter(tokens)
        return [[*islice(sampled, chunk.num_sampled)] for chunk in chunks]

    @torch.inference_mode()
    def _forward(self, chunks: Sequence[Chunk]) -> list[SampledToken]:
        logits = self._graphs.run(chunks, self._scheduler.block_table) if self._graphs else None
        if logits is not None:
            self._find_route([])  # it would keep the masks of the last step without a graph
        else:
            if self._graphs:
                self._graphs.release()  # they would keep those of the last step with one
            logits = self._run_model(chunks)
        self.counts.steps += 1
        self.counts.computed += sum(chunk.stop - chunk.start for chunk in chunks)
        if any(chunk.request.unscored for chunk in chunks):
            logits = self._score_prompts(chunks, logits)
        rows = [
            SampledRow(chunk.request, chunk.draft[:ahead]) for chunk in chunks for ahead in range(chunk.num_sampled)
        ]
        return self._sampler.sample_rows(logits, rows)

    def _score_prompts(self, chunks: Sequence[Chunk], logits: Tensor) -> Tensor:
        """Score the tokens of prompts that requests ask for. The logits that are sampled: [samples, vocabulary]."""
        sampled: list[int] = []
        row = 0
        for chunk in chunks:
            request, positions = chunk.request, chunk.scored
            if positions and request.prompt_logprobs is not None:
                rows = logits[row : row + len(positions)]
                following = request.prompt[positions.start + 1 : positions.stop + 1]
                request.add_scores(score_tokens(rows, following, request.prompt_logprobs))
            row += len(positions)
            sampled += range(row, row + chunk.num_sampled)
            row += chunk.num_sampled
        return logits[sampled]

    def _run_model(self, chunks: Sequence[Chunk]) -> Tensor:
        batch = pack(chunks, self._scheduler.block_table, self._caches, self._find_route)
        with collect_states(self.base.model, batch.embedded):
            logits: Tensor = self.base.model(
                input_ids=batch.ids,
                position_ids=batch.positions,
                attention_mask=attention.NO_MASK,
                use_cache=False,
                logits_to_keep=batch.logit_rows,
                route=batch.route,
                plan=batch.plan,
            ).logits[0]  # [logit rows, vocabulary]
        return logits

    def _find_route(self, spans: list[Span]) -> Route:
        """The route of a step; the last one if the masks of its rows are the same."""
        if spans != self._spans:
            self._spans, self._route = spans, make_route(spans)
        return self._route

    def _release_masks(self) -> None:
        """Drop the references to the masks of the last step, which a load may need the room of."""
        self._find_route([])
        if self._graphs:
            self._graphs.release()

    def _process_output(self, chunks: Sequence[Chunk], sampled: Sequence[list[SampledToken]]) -> None:
        """Record the computed chunks and append the sampled tokens."""
        for chunk, tokens in zip(chunks, sampled, strict=True):
            request = chunk.request
            if request.batch_index < 0:  # failed in this step
                continue
            if not request.scores_are_finite or (tokens and tokens[0].token is None):
                self._block_manager.unregister(request.blocks)  # their content may be the cause
                self._fail(request, "the model's output is not a number, or the grammar allows no token")
                continue
            self._scheduler.complete(chunk._replace(stop=chunk.stop - len(chunk.draft)))
            request.report_scores()
            if tokens:
                self._accept_draft(chunk, tokens)
            elif not request.num_uncomputed:
                self._finish_prompt(request)

    def _accept_draft(self, chunk: Chunk, tokens: Sequence[SampledToken]) -> None:
        """Append sampled tokens as long as they are the draft's, and the one after. The positions of the rest of the
        draft count as not computed: later tokens overwrite their keys and values.
        """
        request, draft = chunk.request, chunk.draft
        accepted = 0
        for ahead, (token, logprob, top) in enumerate(tokens):
            if token is None or request.batch_index < 0:
                break
            if ahead:  # the token before was the draft's, so its position is computed
                self._scheduler.complete(Chunk(request, request.num_computed, request.num_computed + 1, True))
            self._accept(request, token, logprob, top)
            if token != (draft[ahead] if ahead < len(draft) else None):
                break
            accepted += 1
        if draft:
            self.counts.drafted += len(draft)
            self.counts.accepted += accepted
            request.lookup.record(len(request.ids), len(draft), accepted)

    def _accept(self, request: Request, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> None:
        self.counts.sampled += 1
        try:
            reason = request.accept(token, logprob, top)
        except Exception as error:
            _log.exception("a token cannot be added to its answer, which ends with an error")
            self._fail(request, f"the answer cannot be continued: {error}")
        else:
            if reason:
                self._scheduler.retire(request, reason)

    def _finish_prompt(self, request: Request) -> None:
        """End a request whose prompt is computed, and which has no answer to generate."""
        if request.embedding is None:
            self._scheduler.retire(request, "length")
        elif request.embedding.finish():
            self._scheduler.retire(request, "stop")
        else:
            self._fail(request, "the model's hidden states are not numbers")

    def _fail(self, request: Request, message: str) -> None:
        self._scheduler.retire(request, "error", StepFailed(message))

    def _emit_step(self) -> None:
        """Call `on_step`; its failure does not stop the engine."""
        try:
            self.on_step()
        except Exception:
            _log.exception("the callback after a step failed")

    def _recover(self, error: Exception) -> None:
        """Reset the state, which a failure may have left inconsistent. Requests that have not started keep their
        place; the others end.
        """
        _log.error("a step failed outside of the forward pass; all running requests end", exc_info=error)
        waiting = sorted((one for one in self._unfinished if not one.started), key=lambda one: one.arrival)
        lost = [one for one in self._unfinished if one.started]
        queued = set(waiting)
        while self._inbox and self._inbox[0] in queued:
            self._inbox.popleft()  # the failure was between the queue and the inbox
        self._reset()
        self._unfinished = queued
        for request in waiting:
            request.reset_computed()  # the failure may have been during its admission
        self._scheduler.add(waiting)
        for request in lost:
            request.finish("error", StepFailed(f"the step failed: {error}"))

    def _reset(self) -> None:
        self._block_manager = BlockManager(self._cache.num_blocks)
        config = SchedulerConfig(
            self.config.max_running,
            self.config.max_batch_tokens,
            self.config.prefill_budget or PREFILL_BUDGETS.get(self.base.device.type, self.config.max_batch_tokens),
            self._count_draft_rows(),
        )
        self._scheduler = Scheduler(self._block_manager, config, self.counts, self.max_length)
        self._sampler = Sampler()
        self._spans, self._route = [], Route(())

    def _run(self) -> None:
        while True:
            with self._wake:
                self._step_started = None
                if not self._busy():
                    self._wake.notify_all()  # `drain` waits for this
                self._wake.wait_for(lambda: self._stopping or self._busy() or self._background)
                if self._stopping:
                    return
                self._step_started = self._clock()
            if self.step():
                self._background.count_step()
            self._step_started = None  # a background task does not count as a hung step
            self._background.run_due(serving=self._busy())

    def _busy(self) -> bool:
        return bool(self._inbox or self._unfinished)

    def _count_draft_rows(self) -> int:
        device = self.base.device.type
        speculate = device in DRAFT_ROWS if self.config.speculate is None else self.config.speculate
        return DRAFT_ROWS.get(device, max(DRAFT_ROWS.values())) if speculate else 0

    def _count_blocks(self) -> int:
        block_bytes = bytes_per_position(self.base.model.config, self.base.dtype) * BLOCK_SIZE
        return count_blocks(block_bytes, self.base.context, self.config.max_running, self.config.cache_bytes)

    def _check(self, request: Request) -> None:
        context, prompt, vocabulary = self.base.context, len(request.prompt), self.base.vocabulary
        if request.max_tokens < 0:
            raise InvalidValue(f"max_tokens is {request.max_tokens}; it must be at least 0", param="max_tokens")
        if request.prompt_logprobs is not None and not 0 <= request.prompt_logprobs <= MAX_LOGPROBS:
            raise InvalidValue(
                f"prompt_logprobs is {request.prompt_logprobs}; it must be between 0 and {MAX_LOGPROBS}",
                param="prompt_logprobs",
            )
        if not 0 <= request.min_tokens <= request.max_tokens:
            raise InvalidValue(
                f"min_tokens is {request.min_tokens}; it must be between 0 and max_tokens, which is "
                f"{request.max_tokens}",
                param="min_tokens",
            )
        if not request.prompt:
            raise InvalidValue("the prompt is empty", param="messages")
        for param, tokens in (("messages", request.prompt), ("logit_bias", request.sampling.bias)):
            unknown = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if unknown is not None:
                raise InvalidValue(f"token id {unknown} is outside of the vocabulary of {vocabulary}", param=param)
        for limit, given in ((context, ""), (self._cache.positions, " with the cache it was given")):
            if request.max_length > limit:
                raise ContextTooLong(
                    f"This model's maximum context length is {limit} tokens{given}. However, {request.max_length} were "
                    f"requested ({prompt} in the messages, {request.max_tokens} in the completion).",
                    param="messages",
                    tokens=prompt,
                )
