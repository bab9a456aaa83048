"""Executes jobs one at a time, in small steps, with cancellation and recovery after a crash."""

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
IDLE_SECONDS = 0.5  # between checks for jobs of other processes and requeued ones
TIDY_SECONDS = 3600.0
REPORT_SECONDS = 1.0  # least time between two progress events of one stage


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
    """The result of a finished job."""

    result: Mapping[str, Any]


class Cancelled(BaseException):
    """Thrown into the work of a cancelled job. Work that is only closed is started again later."""


Work = Generator[WorkItem, None, Callable[[], Outcome]]
Execute = Callable[[Callable[[], WorkItem | Callable[[], Outcome]]], WorkItem | Callable[[], Outcome]]


class Runner:
    """One thread that takes jobs from a table and executes them.

    `prepare` turns a job into its work, on the runner's thread. `execute` runs a work item that uses the model, on a
    thread of its choice, and returns when it is done. The first work item, those that do not use the model, and the
    function that the work returns run on the runner's thread. `tidy` is called every `TIDY_SECONDS` between jobs.
    """

    def __init__(
        self, table: JobTable, prepare: Callable[[Job], Work], execute: Execute, tidy: Callable[[], None] = lambda: None
    ) -> None:
        self._table = table
        self._prepare = prepare
        self._execute = execute
        self._tidy = tidy
        self._tidied = time.monotonic()
        self._woken = threading.Event()
        self._stopping = False
        self._cancelled: set[str] = set()
        self._needs_requeue = False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Requeue the jobs that a dead server left running, and start the thread."""
        self._table.requeue_running()
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current work item; a running job goes back to the queue."""
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
            self._table.requeue_running()

    def wake(self) -> None:
        """Look for a new job now."""
        self._woken.set()

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once if it waits, after the current work item if it runs.

        Raises `StateConflict` after its end.
        """
        job = self._table.ask_to_cancel(job_id)
        if job.cancelling:
            self._cancelled.add(job_id)
        return job

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._run_next()
            except Exception:  # a full disk, a locked table: the jobs stay in the table
                _log.exception("the jobs cannot be run; trying again")
                self._needs_requeue = True
                self._woken.wait(IDLE_SECONDS)

    def _run_next(self) -> None:
        if self._needs_requeue:
            self._table.requeue_running()
            self._needs_requeue = False
        if time.monotonic() - self._tidied >= TIDY_SECONDS:
            self._tidied = time.monotonic()
            self._tidy()
        job = self._table.take_next()
        if job is not None:
            self._run_job(job)
            return
        self._woken.wait(IDLE_SECONDS)
        self._woken.clear()

    def _run_job(self, job: Job) -> None:
        try:
            outcome = self._run_work(job)
        except Cancelled:
            self._table.finish(job.id, "cancelled")
        except NotReady as error:  # the engine is stopping, or broken; that is not the job's fault
            _log.warning("the job %s goes back to the queue: %s", job.id, error)
            self._table.requeue_running()
            self._woken.wait(IDLE_SECONDS)
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

    def _run_work(self, job: Job) -> Outcome | None:
        """Run one work item after the other; None if the runner is stopping."""
        reported, stage, uses_model = 0.0, "", False
        with closing(self._prepare(job)) as work:
            while not self._stopping:
                if job.id in self._cancelled:
                    work.throw(Cancelled())
                step = self._execute(lambda: _advance(work)) if uses_model else _advance(work)
                if not isinstance(step, WorkItem):
                    return step()
                uses_model = step.model_next
                now = time.monotonic()
                if step.stage != stage or step.done == step.total or now - reported >= REPORT_SECONDS:
                    reported, stage = now, step.stage
                    data = {"stage": step.stage, "step": step.done, "total_steps": step.total}
                    self._table.add_event(job.id, "info", str(step), data)
        return None


def _advance(work: Work) -> WorkItem | Callable[[], Outcome]:
    try:
        return next(work)
    except StopIteration as end:
        finish: Callable[[], Outcome] = end.value
        return finish


def _describe(error: MasqueradeError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "param": error.param}
