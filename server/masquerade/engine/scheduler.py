"""Who runs in the next step, and with how many tokens.

Knows the queue, the running requests and the pages they hold. Refuses to know about tensors of the model and about
masks: personas share a batch freely, so none of them changes the schedule.

A request is admitted when there are pages for what it knows so far. If a running one then needs a page and none is
free, the last in rank gives its pages back and is computed again later; the first in rank is never asked to, so
somebody always gets ahead.
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
from masquerade.engine.queue import Queue
from masquerade.engine.request import Reason, Request
from masquerade.errors import MasqueradeError

WORTH_WAITING = 4  # pages that another request is about to compute


@dataclass(frozen=True)
class SchedulerConfig:
    """What a step may hold."""

    running: int  # requests
    tokens: int  # in one step
    beside_decodes: int  # least of prompts in a step that also decodes: what running answers wait for new ones


class Chunk(NamedTuple):
    """The positions [start, stop) of a request, to go through the model in one step."""

    request: Request
    start: int
    stop: int
    samples: bool  # whether it reaches the request's last known token

    @property
    def is_decode(self) -> bool:
        """A single position, of whatever kind, takes the batched decode path."""
        return self.stop - self.start == 1


class Scheduler:
    """Decode first, then prompts in chunks while the step's token budget lasts."""

    def __init__(self, pool: BlockManager, limits: SchedulerConfig, counts: Counts, longest: int) -> None:
        self._pool = pool
        self._limits = limits
        self._counts = counts
        self._seats = list(range(limits.running - 1, -1, -1))
        self.table: NDArray[np.int64] = np.zeros(
            (limits.running, -(-longest // BLOCK_SIZE)), np.int64
        )  # pages of each seat
        self.fresh: list[int] = []  # pages taken for this step, with whatever somebody left in them
        self.copies: list[tuple[int, int, int]] = []  # into some of them: from a page, to a page, so many places
        self.waiting = Queue()
        self.running: list[Request] = []  # by rank

    def enter(self, requests: Iterable[Request]) -> None:
        """Have new requests wait for their turn."""
        self._charge(self.running)
        for request in requests:
            self.waiting.enter(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, decodes in front."""
        self.fresh.clear()
        self._pool.release(source for source, _, _ in self.copies)
        self.copies.clear()
        self._drop_cancelled()
        chunks: dict[Request, Chunk] = {}
        prompts: list[Request] = []
        for request in self.running.copy():
            if len(request.ids) - request.done > 1:
                prompts.append(request)
            elif request.seat >= 0:  # not preempted by one before it
                self._advance(request, 1, chunks)
        budget = min(self._limits.tokens - len(chunks), self._share(len(chunks)))
        for request in prompts:
            if request.seat >= 0 and budget:
                budget -= self._advance(request, min(request.pending, budget), chunks)
        self._admit(budget, chunks)
        return sorted(chunks.values(), key=_place)

    def complete(self, chunk: Chunk) -> None:
        """Note that a chunk went through the model: pages that it filled can be found by others."""
        request, start, stop, _ = chunk
        request.done = stop
        if stop // BLOCK_SIZE > request.published:
            self._publish(request, stop // BLOCK_SIZE)
        prompt = len(request.prompt)
        if start < prompt <= stop and request.tail:
            self._pool.publish(request.pages[(prompt - 1) // BLOCK_SIZE], request.tail_key())

    def retire(self, request: Request, reason: Reason, error: MasqueradeError | None = None) -> None:
        """Take a running request out, give its pages back, tell its owner."""
        self._leave(request)
        self.waiting.leave(request)
        request.finish(reason, error)

    def _share(self, decodes: int) -> int:
        """Prompt tokens of a step. Beside decodes they make everybody who decodes wait; that is worth more, the more
        there are who wait for their first token.
        """
        if not decodes:
            return self._limits.tokens
        new = len(self.running) - decodes + min(len(self.waiting), len(self._seats))
        return self._limits.beside_decodes * max(1, (2 * new // decodes) ** 2)

    def _advance(self, request: Request, size: int, chunks: dict[Request, Chunk]) -> int:
        """Plan the next positions of a running request; 0 if it had to give way itself."""
        start = request.done
        stop = start + size
        if stop > len(request.pages) * BLOCK_SIZE and not self._extend(request, stop, chunks):
            return 0
        chunks[request] = Chunk(request, start, stop, stop == len(request.ids))
        return size

    def _extend(self, request: Request, stop: int, chunks: dict[Request, Chunk]) -> bool:
        """Pages for the positions before `stop`; those who are last in rank give way, perhaps the request itself."""
        missing = -(-stop // BLOCK_SIZE) - len(request.pages)
        while missing > self._pool.free:
            last = self.running[-1]
            self._preempt(last)
            chunks.pop(last, None)
            if last is request:
                return False
        self._grow(request, missing)
        return True

    def _grow(self, request: Request, missing: int) -> None:
        for _ in range(missing):
            page = self._pool.take()
            self.fresh.append(page)
            self._hold(request, page)

    def _hold(self, request: Request, page: int) -> None:
        self.table[request.seat, len(request.pages)] = page
        request.pages.append(page)

    def _admit(self, budget: int, chunks: dict[Request, Chunk]) -> None:
        if not self._has_place():
            return
        self._charge(self.running)
        promised: set[bytes] | None = None
        skipped: set[Request] = set()
        while budget > 0 and (request := self.waiting.pick(skipped)):
            if promised is None:
                promised = {key for one in self.running for key in self._promise(one)}
            found = self._find(request)
            if self._is_worth_waiting(request, len(found), promised):
                skipped.add(request)
                continue
            if not self._make_room(request, found, chunks):
                return
            self._seat(request, found)
            promised.update(self._promise(request))
            budget -= self._advance(request, min(request.pending, budget), chunks)

    def _has_place(self) -> bool:
        """Whether there is a seat for somebody who waits, perhaps one that a lower priority gives up."""
        return bool(self.waiting) and (bool(self._seats) or self.waiting.outranks(self.running[-1]))

    def _charge(self, requests: Iterable[Request]) -> None:
        """Enter what was said since the last time: nobody looks at the accounts in between."""
        for request in requests:
            self.waiting.charge(request, request.answered - request.charged)
            request.charged = request.answered

    def _find(self, request: Request) -> list[int]:
        """Pages that hold the request's beginning. The last known token must be computed: its logits are needed."""
        found = []
        for key in request.keys((len(request.ids) - 1) // BLOCK_SIZE):
            page = self._pool.find(key)
            if page is None:
                break
            found.append(page)
        return found

    def _promise(self, request: Request) -> list[bytes]:
        """Pages of its prompt that a running request has not computed yet."""
        return request.keys(len(request.prompt) // BLOCK_SIZE)[request.done // BLOCK_SIZE :]

    def _is_worth_waiting(self, request: Request, found: int, promised: set[bytes]) -> bool:
        keys = request.keys((len(request.ids) - 1) // BLOCK_SIZE)[found : found + WORTH_WAITING]
        return len(keys) == WORTH_WAITING and promised.issuperset(keys)

    def _make_room(self, request: Request, found: list[int], chunks: dict[Request, Chunk]) -> bool:
        """A seat, and pages for all it knows with one to spare for everybody who runs; lower priorities give way."""
        while True:
            idle = sum(self._pool.is_idle(page) for page in found)
            spare = len(self.running)  # each may need a page soon
            needed = -(-len(request.ids) // BLOCK_SIZE) - len(found) + idle + spare
            if self._seats and needed <= self._pool.free:
                return True
            if not self.running or self.running[-1].priority >= request.priority:
                return False
            chunks.pop(self.running[-1], None)
            self._preempt(self.running[-1])

    def _seat(self, request: Request, found: list[int]) -> None:
        self.waiting.remove(request)
        request.seat = self._seats.pop()
        for page in found:
            self._pool.hold(page)
            self._hold(request, page)
        request.done = len(found) * BLOCK_SIZE
        request.published = len(found)
        self._borrow_tail(request)
        self._counts.cached += request.done
        if not request.started:
            request.started = True
            request.cached = request.done
            self.waiting.charge(request, request.pending)
        insort(self.running, request, key=_rank)

    def _borrow_tail(self, request: Request) -> None:
        """If somebody's page begins with the end of the same prompt, copy that instead of computing it."""
        if request.answered or not request.tail or request.done != len(request.prompt) - 1 - request.tail:
            return
        source = self._pool.find(request.tail_key())
        if source is None or self._pool.free - self._pool.is_idle(source) < 1:
            return
        self._pool.hold(source)  # until it is copied
        self._grow(request, 1)
        self.copies.append((source, request.pages[-1], request.tail))
        request.done += request.tail

    def _publish(self, request: Request, full: int) -> None:
        for page, key in zip(
            request.pages[request.published : full], request.keys(full)[request.published :], strict=True
        ):
            self._pool.publish(page, key)
        request.published = full

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self.waiting.put(request)
        self._counts.preemptions += 1

    def _leave(self, request: Request) -> None:
        """Give back a running request's pages and seat; ends before beginnings, which are worth more."""
        self._charge([request])
        self.running.remove(request)
        self._pool.release(reversed(request.pages))
        self.table[request.seat] = 0
        self._seats.append(request.seat)
        request.lose()

    def _drop_cancelled(self) -> None:
        for request in [request for request in self.running if request.cancelled]:
            self.retire(request, "cancelled")
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            self.waiting.leave(request)
            request.finish("cancelled")


def _place(chunk: Chunk) -> int:
    """Decodes first, those of similar length together; of these by seat, so that a batch keeps its order."""
    request, start, stop, _ = chunk
    return ((stop - start > 1) << 62) + (stop.bit_length() << 32) + request.seat


def _rank(request: Request) -> tuple[int, int]:
    return -request.priority, request.arrival
