"""Background tasks: small functions from other threads that run on the engine's thread between steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from masquerade.errors import InvalidValue

T = TypeVar("T")
MAX_CREDIT = 1.0  # seconds by which tasks may fall behind their share and catch up later


class BackgroundTasks:
    """A queue of tasks, run one at a time.

    While requests are served, a task is due after every `steps` steps. At most one token in `steps` is delayed, so with
    more than 20 steps the 95th percentile of the time between tokens does not change. `share` is the least part of the
    time that tasks get in any case, so that they finish. Without requests every task is due.
    """

    def __init__(self, steps: int = 24, share: float = 0.02, clock: Callable[[], float] = time.monotonic) -> None:
        if steps < 0 or not 0 <= share <= 1:
            raise InvalidValue(
                f"steps is {steps} and share is {share}; steps must be at least 0, and share between 0 and 1"
            )
        self._steps, self._share, self._clock = steps, share, clock
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._passed = steps  # steps since the last task
        self._entitled = self._clock()  # from when on the share allows the next task

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a task; the future gets its result or its exception. The caller wakes the engine's thread."""
        outcome: Future[T] = Future()
        self._waiting.append((work, outcome))
        return outcome

    def count_step(self) -> None:
        """Record a step of the engine."""
        self._passed += 1

    def run_due(self, *, serving: bool) -> bool:
        """Run the next task if it is due; returns whether one was."""
        if not self._waiting or (serving and not self._is_due()):
            return False
        started = self._clock()
        self._run(*self._waiting.popleft())
        spent = self._clock() - started
        entitled = max(self._entitled, started - MAX_CREDIT)
        self._entitled = entitled + spent / self._share if self._share else math.inf
        self._passed = 0
        return True

    def fail_all(self, error: BaseException) -> None:
        """End all queued tasks with an error."""
        while self._waiting:
            outcome = self._waiting.popleft()[1]
            if outcome.set_running_or_notify_cancel():  # not cancelled
                outcome.set_exception(error)

    @staticmethod
    def _run(work: Callable[[], Any], outcome: Future[Any]) -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(work())
            except (
                BaseException
            ) as error:  # even a MemoryError belongs to the task and must not end the engine's thread
                outcome.set_exception(error)

    def _is_due(self) -> bool:
        return self._passed >= self._steps or self._clock() >= self._entitled
