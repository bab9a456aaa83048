"""Works jobs off, one at a time, in small steps.

Knows the queue, cancelling and what to do after a crash. Refuses to know what is built and which thread may touch the
model: the work and the place to do it are given.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from masquerade.errors import BuildFailed, MasqueradeError, NotReady
from masquerade.jobs.records import Job
from masquerade.jobs.table import JobTable

_log = logging.getLogger(__name__)
IDLE_SECONDS = 0.5  # how soon a job of another process, or one put back, is noticed
TIDY_SECONDS = 3600.0
TELL_SECONDS = 1.0  # progress within a stage is told at most this often


@dataclass(frozen=True)
class WorkItem:
    """`done` of `total` parts of a stage are finished; a total of None is not known.

    `model_next` is whether the work item after this one uses the model.
    """

    stage: str
    done: int
    total: int | None
    model_next: bool = True

    def __str__(self) -> str:
        return f"{self.stage} {self.done}" + (f"/{self.total}" if self.total else "")


@dataclass(frozen=True)
class Outcome:
    """What a finished job has made."""

    result: Mapping[str, Any]


class Cancelled(BaseException):
    """Thrown into the work of a job that was cancelled. Work that is only closed goes on another time."""


Work = Generator[WorkItem, None, Callable[[], Outcome]]
Execute = Callable[[Callable[[], WorkItem | Callable[[], Outcome]]], WorkItem | Callable[[], Outcome]]


class Runner:
    """One thread that takes jobs from a table and has their work done.

    `prepare` turns a job into its work, on the runner's thread. Work items that use the model are done by `execute`,
    wherever that may be, which returns when one is done; all others, the first one among them, are done on the runner's
    thread. So is what the work returns. `tidy` is called from time to time between jobs.
    """

    def __init__(
        self, table: JobTable, prepare: Callable[[Job], Work], execute: Execute, tidy: Callable[[], None] = lambda: None
    ) -> None:
        self._table = table
        self._prepare = prepare
        self._execute = execute
        self._tidy = tidy
        self._tidied = time.monotonic()
        self._wake = threading.Event()
        self._stopping = False
        self._cancelled: set[str] = set()
        self._lost_track = False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Put back what a server that died was working on, and begin."""
        self._table.requeue_running()
        self._thread.start()

    def stop(self) -> None:
        """End after the current item; a running job goes back to the queue, for when a server starts again."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
            self._table.requeue_running()

    def notice(self) -> None:
        """There is a new job."""
        self._wake.set()

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once if it waits, within one work item if it runs. Raises `StateConflict` after its end."""
        job = self._table.ask_to_cancel(job_id)
        if job.cancelling:
            self._cancelled.add(job_id)
        return job

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception:  # a disk that is full, a table that is locked: the jobs wait, and are not lost
                _log.exception("the jobs cannot be worked at; trying again")
                self._lost_track = True
                self._wake.wait(IDLE_SECONDS)

    def _turn(self) -> None:
        if self._lost_track:
            self._table.requeue_running()
            self._lost_track = False
        if time.monotonic() - self._tidied >= TIDY_SECONDS:
            self._tidied = time.monotonic()
            self._tidy()
        job = self._table.take_next()
        if job is not None:
            self._work_off(job)
            return
        self._wake.wait(IDLE_SECONDS)
        self._wake.clear()

    def _work_off(self, job: Job) -> None:
        try:
            outcome = self._drive(job)
        except Cancelled:
            self._table.finish(job.id, "cancelled")
        except NotReady as error:  # who does the work is stopping, or broken; that is not the job's fault
            _log.warning("the job %s goes back to the queue: %s", job.id, error)
            self._table.requeue_running()
            self._wake.wait(IDLE_SECONDS)
        except MasqueradeError as error:
            self._table.finish(job.id, "failed", error=_describe(error))
        except Exception as error:
            _log.exception("the job %s failed", job.id)
            failure = BuildFailed(f"the build failed: {type(error).__name__}; the server's log says why")
            self._table.finish(job.id, "failed", error=_describe(failure))
        else:
            if outcome is not None:
                self._table.finish(job.id, "succeeded", result=outcome.result)
        finally:
            self._cancelled.discard(job.id)

    def _drive(self, job: Job) -> Outcome | None:
        """Item after item; None if the runner is stopping."""
        told, stage, uses_model = 0.0, "", False
        with closing(self._prepare(job)) as work:
            while not self._stopping:
                if job.id in self._cancelled:
                    work.throw(Cancelled())
                step = self._execute(lambda: _advance(work)) if uses_model else _advance(work)
                if not isinstance(step, WorkItem):
                    return step()
                uses_model = step.model_next
                now = time.monotonic()
                if step.stage != stage or step.done == step.total or now - told >= TELL_SECONDS:
                    told, stage = now, step.stage
                    data = {"stage": step.stage, "step": step.done, "total_steps": step.total}
                    self._table.tell(job.id, "info", str(step), data)
        return None


def _advance(work: Work) -> WorkItem | Callable[[], Outcome]:
    try:
        return next(work)
    except StopIteration as end:
        finish: Callable[[], Outcome] = end.value
        return finish


def _describe(error: MasqueradeError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "param": error.param}
