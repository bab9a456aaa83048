"""Executes jobs one at a time, in small steps, with cancellation and recovery after a crash."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from masquerade.errors import BuildFailed, MasqueradeError, NotReady
from masquerade.jobs.records import Job
from masquerade.jobs.table import JobTable

if TYPE_CHECKING:
    from masquerade.pruning import Progress

_log = logging.getLogger(__name__)
IDLE_SECONDS = 0.5  # between checks for jobs of other processes and requeued ones
TIDY_SECONDS = 3600.0
REPORT_SECONDS = 1.0  # least time between two progress events of one stage


class Cancelled(BaseException):
    """Thrown into the work of a cancelled job. Work that is only closed is started again later."""


# The work items of a job; the function that it returns makes the job's result.
Work = Generator["Progress", None, Callable[[], Mapping[str, Any]]]
Execute = Callable[[Callable[[], "Progress"]], "Progress"]


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
            result = self._run_work(job)
        except Cancelled:
            self._table.finish(job.id, "cancelled")
        except NotReady as error:  # the engine is stopping, or broken; that is not the job's fault
            _log.warning("the job %s goes back to the queue: %s", job.id, error)
            self._table.requeue_running()
            self._woken.wait(IDLE_SECONDS)
        except MasqueradeError as error:
            made = error.result if isinstance(error, BuildFailed) else None
            self._table.finish(job.id, "failed", result=made, error=_describe(error))
        except Exception as error:
            _log.exception("the job %s failed", job.id)
            failure = BuildFailed(f"the build failed: {type(error).__name__}; the server's log says why")
            self._table.finish(job.id, "failed", error=_describe(failure))
        else:
            if result is not None:
                self._table.finish(job.id, "succeeded", result=result)
        finally:
            self._cancelled.discard(job.id)

    def _run_work(self, job: Job) -> Mapping[str, Any] | None:
        """Run one work item after the other. The job's result, or None if the runner is stopping."""
        reported, stage, uses_model = 0.0, "", False
        with closing(self._prepare(job)) as work:
            while not self._stopping:
                if job.id in self._cancelled:
                    work.throw(Cancelled())
                try:
                    step = self._execute(lambda: next(work)) if uses_model else next(work)
                except StopIteration as end:
                    finish: Callable[[], Mapping[str, Any]] = end.value
                    return finish()
                uses_model = step.model_next
                now = time.monotonic()
                if step.stage != stage or step.done == step.total or now - reported >= REPORT_SECONDS:
                    reported, stage = now, step.stage
                    data = {"stage": step.stage, "step": step.done, "total_steps": step.total}
                    parts = f"{step.done}/{step.total}" if step.total else f"{step.done}"
                    self._table.add_event(job.id, "info", f"{step.stage} {parts}", data)
        return None


def _describe(error: MasqueradeError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "param": error.param}
