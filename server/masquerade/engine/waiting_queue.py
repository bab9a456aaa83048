"""The queue of waiting requests, ordered by priority and fair share.

Fairness is counted in tokens: the owner that was served the fewest goes first, and of its personas the one that was
served the fewest. A rarely used persona, or the base, does not wait behind a burst of requests for another one.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Hashable, Iterator

from masquerade.engine.request import Request

_MAX_INACTIVE = 4096  # owners and flows without requests whose totals are kept


class WaitingQueue:
    """Waiting requests by priority, then by fair share; requests of one flow are first come, first served.

    A flow is an owner's requests for one mask. Totals of owners and flows count while they have requests that wait or
    run.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, Hashable], deque[Request]] = {}  # by priority and flow
        self._size = 0
        self._served: dict[Hashable, int] = {}  # tokens by owner and by flow
        self._active: Counter[Hashable] = Counter()  # requests that wait or run, by owner and by flow
        self._active_in: dict[Hashable, set[Hashable]] = defaultdict(set)  # active flows by owner; owners under None

    def __len__(self) -> int:
        return self._size  # a counter, since other threads read it

    @property
    def num_foreground(self) -> int:
        """Waiting requests that are not background."""
        return sum(len(queue) for (priority, _), queue in self._queues.items() if priority >= 0)

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def add(self, request: Request) -> None:
        """Enqueue a new request. An owner or flow that was inactive starts with the smallest total of the active ones,
        so that absence earns no credit.
        """
        for key, group in ((request.owner, None), (request.flow, request.owner)):
            if not self._active[key]:
                least = min((self._served[other] for other in self._active_in[group]), default=0)
                self._served[key] = max(self._served.pop(key, 0), least)
                self._active_in[group].add(key)
            self._active[key] += 1
        self.requeue(request)

    def forget(self, request: Request) -> None:
        """Account for the end of a request, whether it waited or ran."""
        for key, group in ((request.owner, None), (request.flow, request.owner)):
            self._active[key] -= 1
            if not self._active[key]:
                del self._active[key]
                self._active_in[group].discard(key)
                if group is not None and not self._active_in[group]:
                    del self._active_in[group]
        if len(self._served) > _MAX_INACTIVE + len(self._active):
            inactive = next(key for key in self._served if key not in self._active)
            del self._served[inactive]

    def requeue(self, request: Request) -> None:
        """Insert an active request by arrival: a preempted one goes before those that arrived later."""
        queue = self._queues.setdefault((request.priority, request.flow), deque())
        place = len(queue)
        while place and queue[place - 1].arrival > request.arrival:
            place -= 1
        queue.insert(place, request)
        self._size += 1

    def remove(self, request: Request) -> None:
        """Take a request out of the queue."""
        key = (request.priority, request.flow)
        self._queues[key].remove(request)
        self._size -= 1
        if not self._queues[key]:
            del self._queues[key]

    def outranks(self, request: Request) -> bool:
        """Whether a waiting request has a higher priority than this one."""
        return any(priority > request.priority for priority, _ in self._queues)

    def charge(self, request: Request, tokens: int) -> None:
        """Add tokens to the totals of an active request's owner and flow."""
        self._served[request.owner] += tokens
        self._served[request.flow] += tokens

    def peek(self, skipped: Collection[Request] = ()) -> Request | None:
        """The next request, not counting the skipped ones."""
        heads = [next((one for one in queue if one not in skipped), None) for queue in self._queues.values()]
        return min((head for head in heads if head is not None), key=self._order, default=None)

    def _order(self, request: Request) -> tuple[int, int, int, int]:
        return -request.priority, self._served[request.owner], self._served[request.flow], request.arrival
