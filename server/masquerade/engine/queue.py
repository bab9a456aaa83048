"""Who waits, and whose turn it is.

Knows priorities, owners and personas, and how much work each was given. Refuses to know pages and steps.

The one who was given the least goes first, counted in tokens: first among owners, then among the personas of an owner.
So a persona that is asked for rarely, and the base, never wait behind a crowd for another one.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Hashable, Iterator

from masquerade.engine.request import Request

_REMEMBERED = 4096  # accounts of those who have left


class Queue:
    """Waiting requests. Of a higher priority all go before any of a lower one; of one account in order of arrival."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, Hashable], deque[Request]] = {}
        self._size = 0
        self._given: dict[Hashable, int] = {}  # tokens of work: an owner's, and an owner's with a persona
        self._present: Counter[Hashable] = Counter()  # requests that wait or run
        self._inside: dict[Hashable, set[Hashable]] = defaultdict(set)  # present accounts per owner; None: owners

    def __len__(self) -> int:
        return self._size  # other threads ask, too

    def __iter__(self) -> Iterator[Request]:
        for line in self._lines.values():
            yield from line

    def enter(self, request: Request) -> None:
        """A new request. An account that comes back starts level with the least served one that is present."""
        owner, persona = _accounts(request)
        for account, group in ((owner, None), (persona, owner)):
            if not self._present[account]:
                least = min((self._given[other] for other in self._inside[group]), default=0)
                self._given[account] = max(self._given.pop(account, 0), least)
                self._inside[group].add(account)
            self._present[account] += 1
        self.put(request)

    def leave(self, request: Request) -> None:
        """A request that has ended, whether it waited or ran."""
        owner, persona = _accounts(request)
        for account, group in ((owner, None), (persona, owner)):
            self._present[account] -= 1
            if not self._present[account]:
                del self._present[account]
                self._inside[group].discard(account)
                if group is not None and not self._inside[group]:
                    del self._inside[group]
        if len(self._given) > _REMEMBERED + len(self._present):
            absent = next(account for account in self._given if account not in self._present)
            del self._given[absent]

    def put(self, request: Request) -> None:
        """Into its line, by arrival: one that was put back goes before those who came later."""
        line = self._lines.setdefault((request.priority, _accounts(request)[1]), deque())
        place = len(line)
        while place and line[place - 1].arrival > request.arrival:
            place -= 1
        line.insert(place, request)
        self._size += 1

    def remove(self, request: Request) -> None:
        """Out of its line."""
        key = (request.priority, _accounts(request)[1])
        self._lines[key].remove(request)
        self._size -= 1
        if not self._lines[key]:
            del self._lines[key]

    def outranks(self, request: Request) -> bool:
        """Whether somebody waits who has a higher priority than this one."""
        return any(priority > request.priority for priority, _ in self._lines)

    def charge(self, request: Request, tokens: int) -> None:
        """Enter work into the accounts of a present request."""
        owner, persona = _accounts(request)
        self._given[owner] += tokens
        self._given[persona] += tokens

    def pick(self, skipped: Collection[Request] = ()) -> Request | None:
        """The waiting request whose turn it is, leaving out some."""
        heads = [next((one for one in line if one not in skipped), None) for line in self._lines.values()]
        return min((head for head in heads if head is not None), key=self._rank, default=None)

    def _rank(self, request: Request) -> tuple[int, int, int, int]:
        owner, persona = _accounts(request)
        return -request.priority, self._given[owner], self._given[persona], request.arrival


def _accounts(request: Request) -> tuple[Hashable, Hashable]:
    return request.owner, request.account
