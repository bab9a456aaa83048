"""The scheduler: which requests run in the next step, and how many tokens of each.

A request is admitted when there are enough free blocks for its tokens so far. When a running request needs a block and
none is free, the running request that ranks last is preempted and computed again later. The first in rank is never
preempted, so there is always progress. Masks do not affect the schedule.

Requests of negative priority are background. While others wait or run, they take part in few steps. Alone, their
prompts are computed in small chunks, so that a new request never waits for a long step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from masquerade.engine.block_manager import BlockManager
from masquerade.engine.counts import Counts
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.request import Reason, Request
from masquerade.engine.waiting_queue import WaitingQueue
from masquerade.errors import MasqueradeError

PAUSE = 24  # steps of other requests between two with background requests: at most one token in 25 is delayed
MIN_SHARED_BLOCKS = 4  # a request waits while a running one computes at least so many blocks for it


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step."""

    max_running: int  # requests
    max_batch_tokens: int
    prefill_budget: int  # least prompt tokens of a step that also decodes; they delay the running answers
    draft_rows: int = 0  # running answers and their drafts take so many positions of a step together; 0: no drafts


class Chunk(NamedTuple):
    """Positions [start, stop) of a request, computed in one step."""

    request: Request
    start: int
    stop: int
    samples: bool  # whether it includes the request's last token, and the next one is sampled
    draft: tuple[int, ...] = ()  # the tokens of the last positions, if they are not the request's yet

    @property
    def ids(self) -> list[int]:
        """The tokens at these positions."""
        return [*self.request.ids[self.start : self.stop], *self.draft]

    @property
    def num_sampled(self) -> int:
        """The last positions, at which a token is sampled."""
        return 1 + len(self.draft) if self.samples else 0

    @property
    def scored(self) -> range:
        """The positions whose logits score the next token of the prompt."""
        unscored = self.request.unscored
        return range(max(self.start, unscored.start), min(self.stop, unscored.stop))

    @property
    def is_decode(self) -> bool:
        """Whether this is a single position, which is computed with the decodes even if it ends a prompt."""
        return self.stop - self.start == 1


class Scheduler:
    """Schedules decodes first, then prompts in chunks within the step's token budget."""

    def __init__(self, block_manager: BlockManager, config: SchedulerConfig, counts: Counts, max_length: int) -> None:
        self._block_manager = block_manager
        self._config = config
        self._counts = counts
        self._free_indices = list(range(config.max_running - 1, -1, -1))
        shape = config.max_running, -(-max_length // BLOCK_SIZE)
        self.block_table: NDArray[np.int64] = np.zeros(shape, np.int64)  # by batch index; 0 beyond a request's blocks
        self.new_blocks: list[int] = []  # allocated for this step, not yet cleared
        self.copies: list[tuple[int, int, int]] = []  # for this step: source block, target block, positions
        self._paused = 0  # steps since the last one with background requests
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # by rank

    def add(self, requests: Iterable[Request]) -> None:
        """Enqueue new requests."""
        self._charge(self.running)
        for request in requests:
            self.waiting.add(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, decodes first. `new_blocks` and `copies` are to be processed before it runs."""
        self.new_blocks.clear()
        self._block_manager.release(source for source, _, _ in self.copies)
        self.copies.clear()
        self._drop_cancelled()
        due = self._is_background_due()
        chunks: dict[Request, Chunk] = {}
        prompts: list[Request] = []
        background: list[Request] = []  # prompts
        for request in self.running.copy():
            if request.is_background and not due:
                continue
            if request.num_uncomputed > 1:
                (background if request.is_background else prompts).append(request)
            elif request.batch_index >= 0:  # not preempted in this loop
                self._schedule_chunk(request, 1, chunks)
        decodes = sum(not request.is_background for request in chunks)
        rows = len(chunks) + self._draft(chunks)
        budget = min(self._config.max_batch_tokens - rows, self._prefill_budget(decodes, len(prompts)))
        budget = self._admit(self._schedule_prompts(prompts, budget, chunks), chunks, background=False)
        if due:
            budget = self._schedule_prompts(background, min(budget, self._config.prefill_budget), chunks)
            self._admit(budget, chunks, background=True)
        return sorted(chunks.values(), key=_batch_order)

    def complete(self, chunk: Chunk) -> None:
        """Record that a chunk is computed, and register the blocks that it filled."""
        request, start, stop = chunk[:3]
        request.num_computed = stop
        if request.shares_blocks and stop // BLOCK_SIZE > request.num_registered:
            self._register(request, stop // BLOCK_SIZE)
        prompt = len(request.prompt)
        if start < prompt <= stop and request.partial_length:
            self._block_manager.register(request.blocks[(prompt - 1) // BLOCK_SIZE], request.partial_hash())

    def retire(self, request: Request, reason: Reason, error: MasqueradeError | None = None) -> None:
        """End a running request: release its blocks and emit its last event."""
        self._remove(request)
        self.waiting.forget(request)
        request.finish(reason, error)

    def _is_background_due(self) -> bool:
        """Whether background requests take part in this step."""
        self._paused = 0 if not self._has_foreground or self._paused == PAUSE else self._paused + 1
        return self._paused == 0

    @property
    def _has_foreground(self) -> bool:
        """Whether a request that is not background waits or runs."""
        return bool(self.waiting.num_foreground or (self.running and not self.running[0].is_background))

    def _prefill_budget(self, decodes: int, prompts: int) -> int:
        """Prompt tokens of a step. Beside decodes they delay every running answer, so the budget is small; it grows
        with the number of requests that wait for their first token. Background requests do not count.
        """
        if not decodes:
            return self._config.max_batch_tokens
        new = prompts + min(self.waiting.num_foreground, len(self._free_indices))
        return self._config.prefill_budget * max(1, (2 * new // decodes) ** 2)

    def _schedule_prompts(self, requests: Iterable[Request], budget: int, chunks: dict[Request, Chunk]) -> int:
        """Schedule chunks of running requests' prompts within the budget; returns the rest of it."""
        for request in requests:
            if request.batch_index >= 0 and budget:
                budget -= self._schedule_chunk(request, min(request.num_uncomputed, budget), chunks)
        return budget

    def _draft(self, chunks: dict[Request, Chunk]) -> int:
        """Add drafts to running answers, as far as there are free blocks that no prompt needs; returns the number of
        their tokens.

        Background requests have none while others wait or run, whose steps drafts would lengthen.
        """
        rows = min(self._config.draft_rows, self._config.max_batch_tokens // 2)  # prompts get the other half
        most = rows // len(chunks) - 1 if chunks else 0
        if most <= 0:
            return 0
        free = self._block_manager.num_free - sum(_missing_blocks(one, len(one.ids)) for one in self.running)
        drafted = 0
        for request, chunk in chunks.items():
            if request.is_background and self._has_foreground:
                continue
            room = (len(request.blocks) + max(0, free)) * BLOCK_SIZE - chunk.stop
            draft = request.draft(min(most, room))
            if draft:
                stop = chunk.stop + len(draft)
                missing = _missing_blocks(request, stop)
                self._allocate(request, missing)
                free -= missing
                chunks[request] = chunk._replace(stop=stop, draft=draft)
                drafted += len(draft)
        return drafted

    def _schedule_chunk(self, request: Request, size: int, chunks: dict[Request, Chunk]) -> int:
        """Schedule the next `size` positions of a running request; returns 0 if it was preempted instead."""
        start = request.num_computed
        stop = start + size
        if stop > len(request.blocks) * BLOCK_SIZE and not self._extend(request, stop, chunks):
            return 0
        chunks[request] = Chunk(request, start, stop, stop == len(request.ids) and request.max_tokens > 0)
        return size

    def _extend(self, request: Request, stop: int, chunks: dict[Request, Chunk]) -> bool:
        """Allocate blocks up to position `stop`, preempting from the end of the rank; False if that reached the request
        itself.
        """
        missing = _missing_blocks(request, stop)
        while missing > self._block_manager.num_free:
            last = self.running[-1]
            self._preempt(last)
            chunks.pop(last, None)
            if last is request:
                return False
        self._allocate(request, missing)
        return True

    def _allocate(self, request: Request, count: int) -> None:
        for _ in range(count):
            block = self._block_manager.allocate()
            self.new_blocks.append(block)
            self._append_block(request, block)

    def _append_block(self, request: Request, block: int) -> None:
        self.block_table[request.batch_index, len(request.blocks)] = block
        request.blocks.append(block)

    def _admit(self, budget: int, chunks: dict[Request, Chunk], *, background: bool) -> int:
        """Start waiting requests while the token budget, the batch and the cache have room; returns the rest of the
        budget. Without `background`, requests of that kind are neither started nor waited for.
        """
        if not self._can_admit():
            return budget
        self._charge(self.running)
        upcoming: set[bytes] | None = None
        skipped: set[Request] = set()
        while budget > 0 and (request := self.waiting.peek(skipped)):
            if request.is_background and not background:
                break
            if upcoming is None:
                active = (running for running in self.running if background or not running.is_background)
                upcoming = {one for running in active for one in self._upcoming_hashes(running)}
            prefix = self._find_prefix(request)
            if self._should_wait(request, len(prefix), upcoming):
                skipped.add(request)
                continue
            if not self._make_room(request, prefix, chunks):
                break
            self._start(request, prefix)
            upcoming.update(self._upcoming_hashes(request))
            budget -= self._schedule_chunk(request, min(request.num_uncomputed, budget), chunks)
        return budget

    def _can_admit(self) -> bool:
        """Whether a waiting request may get a batch index, perhaps by preempting a lower priority."""
        return bool(self.waiting) and (bool(self._free_indices) or self.waiting.outranks(self.running[-1]))

    def _charge(self, requests: Iterable[Request]) -> None:
        """Add the output since the last call to the fair share, which matters only when requests are admitted."""
        for request in requests:
            self.waiting.charge(request, request.num_output_tokens - request.num_charged)
            request.num_charged = request.num_output_tokens

    def _find_prefix(self, request: Request) -> list[int]:
        """Registered blocks of the request's prefix, without its last token, whose logits are needed."""
        found = []
        for block_hash in request.block_hashes((len(request.ids) - 1) // BLOCK_SIZE):
            block = self._block_manager.lookup(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def _upcoming_hashes(self, request: Request) -> list[bytes]:
        """Hashes of the prompt blocks that a running request has not computed yet."""
        return request.block_hashes(len(request.prompt) // BLOCK_SIZE)[request.num_computed // BLOCK_SIZE :]

    def _should_wait(self, request: Request, found: int, upcoming: set[bytes]) -> bool:
        """Whether running requests are about to compute the blocks that follow the request's cached prefix."""
        hashes = request.block_hashes((len(request.ids) - 1) // BLOCK_SIZE)[found : found + MIN_SHARED_BLOCKS]
        return len(hashes) == MIN_SHARED_BLOCKS and upcoming.issuperset(hashes)

    def _make_room(self, request: Request, prefix: list[int], chunks: dict[Request, Chunk]) -> bool:
        """Ensure a batch index, and blocks for the request's tokens with one to spare for each running request;
        preempts lower priorities. False if that is not possible.
        """
        while True:
            cached = sum(self._block_manager.is_cached(block) for block in prefix)
            spare = len(self.running)
            needed = -(-len(request.ids) // BLOCK_SIZE) - len(prefix) + cached + spare
            if self._free_indices and needed <= self._block_manager.num_free:
                return True
            if not self.running or self.running[-1].priority >= request.priority:
                return False
            chunks.pop(self.running[-1], None)
            self._preempt(self.running[-1])

    def _start(self, request: Request, prefix: list[int]) -> None:
        self.waiting.remove(request)
        request.batch_index = self._free_indices.pop()
        for block in prefix:
            self._block_manager.acquire(block)
            self._append_block(request, block)
        request.num_computed = len(prefix) * BLOCK_SIZE
        request.num_registered = len(prefix)
        self._copy_partial_block(request)
        self._counts.cached += request.num_computed
        if not request.started:
            request.started = True
            request.num_cached = request.num_computed
            self.waiting.charge(request, request.num_uncomputed)
        insort(self.running, request, key=_rank)

    def _copy_partial_block(self, request: Request) -> None:
        """If some block begins with the end of the same prompt, schedule a copy instead of computing it."""
        length = request.partial_length
        if request.num_output_tokens or not length or request.num_computed != len(request.prompt) - 1 - length:
            return
        source = self._block_manager.lookup(request.partial_hash())
        if source is None or self._block_manager.num_free - self._block_manager.is_cached(source) < 1:
            return
        self._block_manager.acquire(source)  # until it is copied
        self._allocate(request, 1)
        self.copies.append((source, request.blocks[-1], length))
        request.num_computed += length

    def _register(self, request: Request, full: int) -> None:
        """Register the first `full` blocks of a request."""
        new = slice(request.num_registered, full)
        for block, block_hash in zip(request.blocks[new], request.block_hashes(full)[new], strict=True):
            self._block_manager.register(block, block_hash)
        request.num_registered = full

    def _preempt(self, request: Request) -> None:
        self._remove(request)
        self.waiting.requeue(request)
        self._counts.preemptions += 1

    def _remove(self, request: Request) -> None:
        """Release a running request's batch index and blocks; the last first, since prefixes are reused more often."""
        self._charge([request])
        self.running.remove(request)
        self._block_manager.release(reversed(request.blocks))
        self.block_table[request.batch_index] = 0
        self._free_indices.append(request.batch_index)
        request.reset_computed()

    def _drop_cancelled(self) -> None:
        for request in [request for request in self.running if request.cancelled]:
            self.retire(request, "cancelled")
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            self.waiting.forget(request)
            request.finish("cancelled")


def _missing_blocks(request: Request, stop: int) -> int:
    """How many blocks a running request lacks for its positions up to `stop`."""
    return max(0, -(-stop // BLOCK_SIZE) - len(request.blocks))


def _batch_order(chunk: Chunk) -> tuple[int, int, int]:
    """Decodes first, then those with drafts, each by length up to a power of two, then by batch index, so that a batch
    keeps its order.
    """
    kind = 0 if chunk.is_decode else 1 if chunk.draft else 2
    return kind, chunk.stop.bit_length(), chunk.request.batch_index


def _rank(request: Request) -> tuple[int, int]:
    return -request.priority, request.arrival
