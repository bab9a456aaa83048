"""Other work for the model's thread, done between steps.

Knows when such work is due while requests are being served. Refuses to know what it is: small pieces of it are handed
in from other threads, which wait for their outcome.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from masquerade.errors import InvalidValue

T = TypeVar("T")
LATENESS = 1.0  # seconds that errands may be behind their share and make up for later


class BackgroundTasks:
    """A queue of pieces of work, done one at a time.

    While requests are served, a piece is due after `steps` steps of theirs: at most one token in so many is delayed, so
    the 95th percentile of the time between tokens stays what it was for any `steps` above 20. `share` is the least part
    of the time that goes to errands nevertheless, so that they end. Without requests everything is due.
    """

    def __init__(self, steps: int = 24, share: float = 0.02, clock: Callable[[], float] = time.monotonic) -> None:
        if steps < 0 or not 0 <= share <= 1:
            raise InvalidValue(f"errands after {steps} steps, for a share of {share}: that is not possible")
        self._steps, self._share, self._clock = steps, share, clock
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._passed = steps  # steps of requests since the last errand
        self._entitled = self._clock()  # when the share entitles to the next errand

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def ask(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of work. The caller wakes the thread; the future has the outcome, or what the work raised."""
        outcome: Future[T] = Future()
        self._waiting.append((work, outcome))
        return outcome

    def pass_step(self) -> None:
        """A step of requests is done."""
        self._passed += 1

    def do_due(self, *, serving: bool) -> bool:
        """Do the next piece if it is due; whether there was one."""
        if not self._waiting or (serving and not self._due()):
            return False
        started = self._clock()
        self._do(*self._waiting.popleft())
        spent = self._clock() - started
        entitled = max(self._entitled, started - LATENESS)
        self._entitled = entitled + spent / self._share if self._share else math.inf
        self._passed = 0
        return True

    def abandon(self, error: BaseException) -> None:
        """Nothing will be done any more: whoever waits gets the error."""
        while self._waiting:
            outcome = self._waiting.popleft()[1]
            if outcome.set_running_or_notify_cancel():  # else nobody waits for it any more
                outcome.set_exception(error)

    @staticmethod
    def _do(work: Callable[[], Any], outcome: Future[Any]) -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(work())
            except BaseException as error:  # even out of memory is the asker's, not the engine's
                outcome.set_exception(error)

    def _due(self) -> bool:
        return self._passed >= self._steps or self._clock() >= self._entitled
