"""Executes jobs one at a time, in small steps, with cancellation and recovery after a crash."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import OperationalError

from masquerade.errors import BuildFailed, BuildRunning, LeaseLost, MasqueradeError, NotReady
from masquerade.jobs.records import LEASE_SECONDS, Job
from masquerade.jobs.table import JobTable

if TYPE_CHECKING:
    from masquerade.pruning import Progress

_log = logging.getLogger(__name__)
IDLE_SECONDS = 0.5  # between checks for jobs of other processes and requeued ones
RENEW_SECONDS = LEASE_SECONDS / 6  # between two renewals of the running job's lease
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

    Where servers share the table, a second thread renews the lease of the running job, and learns of requests to cancel
    it that another server has got. Work whose lease has ended is closed, as if the server had stopped: it is another
    server's.
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
        self._lease: tuple[str, float] | None = None  # of the running job, until a time of the monotonic clock
        self._leasing = threading.Lock()  # guards _lease, while the table has it changed too
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._renewing = threading.Thread(target=self._renew_leases, name="leases", daemon=True)

    def start(self) -> None:
        """Requeue the jobs that a dead server left running, and start the threads."""
        self._table.requeue_running()
        self._thread.start()
        if self._table.group.shared:
            self._renewing.start()

    def stop(self) -> None:
        """Stop after the current work item; a running job goes back to the queue."""
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
            self._stopped.set()
            if self._table.group.shared:
                self._renewing.join()
            with suppress(NotReady):  # without its database, the job's lease ends later
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
            except NotReady as error:  # the database is lost
                _log.warning("the jobs cannot be run; trying again: %s", error)
                self._needs_requeue = True
                self._stopped.wait(IDLE_SECONDS)
            except Exception:  # a full disk, a locked table: the jobs stay in the table
                _log.exception("the jobs cannot be run; trying again")
                self._needs_requeue = True
                self._pause()

    def _run_next(self) -> None:
        if self._needs_requeue:
            self._table.requeue_running()
            self._needs_requeue = False
        if time.monotonic() - self._tidied >= TIDY_SECONDS:
            self._tidied = time.monotonic()
            self._tidy()
        job = self._take_next()
        if job is not None:
            self._run_job(job)
            return
        self._woken.wait(IDLE_SECONDS)
        self._woken.clear()

    def _pause(self) -> None:
        """Wait before another attempt, unless the runner is stopping. What came before does not end the wait."""
        self._woken.clear()
        if not self._stopping:
            self._woken.wait(IDLE_SECONDS)

    def _take_next(self) -> Job | None:
        if not self._table.has_next():
            return None
        with self._leasing:
            now = time.monotonic()  # before the database's clock is read: the lease ends there later than here
            job = self._table.take_next()
            self._lease = (job.id, now + LEASE_SECONDS) if job else None
        return job

    def _run_job(self, job: Job) -> None:
        try:
            result = self._run_work(job)
        except Cancelled:
            self._table.finish(job.id, "cancelled")
        except LeaseLost as error:
            _log.warning("the job %s is given up: %s", job.id, error)
            self._needs_requeue = True  # if it is still this server's
        except NotReady as error:  # the engine is stopping, or broken; that is not the job's fault
            _log.warning("the job %s goes back to the queue: %s", job.id, error)
            self._table.requeue_running()
            self._pause()
        except MasqueradeError as error:
            if isinstance(error, BuildRunning) and self._table.group.shared:
                # the server that has lost its lease is still within a work item
                _log.warning("the job %s goes back to the queue: %s", job.id, error)
                self._table.requeue_running()
                self._stopped.wait(RENEW_SECONDS)
                return
            made = error.result if isinstance(error, BuildFailed) else None
            self._table.finish(job.id, "failed", result=made, error=_describe(error))
        except OperationalError as error:  # the table's disk is full; that is not the job's fault
            _log.warning("the job %s goes back to the queue: %s", job.id, error)
            self._needs_requeue = True
            self._pause()
        except Exception as error:
            _log.exception("the job %s failed", job.id)
            failure = BuildFailed(f"the build failed: {type(error).__name__}; the server's log says why")
            self._table.finish(job.id, "failed", error=_describe(failure))
        else:
            if result is not None:
                self._table.finish(job.id, "succeeded", result=result)
        finally:
            self._cancelled.discard(job.id)
            self._lease = None

    def _run_work(self, job: Job) -> Mapping[str, Any] | None:
        """Run one work item after the other. The job's result, or None if the runner is stopping."""
        reported, stage, done, uses_model = 0.0, "", 0, False
        with closing(self._prepare(job)) as work:
            while not self._stopping:
                self._check_lease(job)
                if job.id in self._cancelled:
                    work.throw(Cancelled())
                try:
                    step = self._execute(lambda: next(work)) if uses_model else next(work)
                except StopIteration as end:
                    finish: Callable[[], Mapping[str, Any]] = end.value
                    if self._table.group.shared:
                        self._renew()
                        self._check_lease(job)
                    return finish()
                uses_model = step.model_next
                now = time.monotonic()
                ends = step.done == step.total != done  # once, if more items follow the last that were counted
                if step.stage != stage or ends or now - reported >= REPORT_SECONDS:
                    reported, stage, done = now, step.stage, step.done
                    data = {"stage": step.stage, "step": step.done, "total_steps": step.total}
                    parts = f"{step.done}/{step.total}" if step.total else f"{step.done}"
                    self._table.add_event(job.id, "info", f"{step.stage} {parts}", data)
        return None

    def _check_lease(self, job: Job) -> None:
        """Raise `LeaseLost` if another server may run a job."""
        if self._table.group.shared and (self._lease is None or time.monotonic() >= self._lease[1]):
            raise LeaseLost(f"this server's lease of the job {job.id} has ended")

    def _renew_leases(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            try:
                self._renew()
            except Exception as error:  # it is tried again until the lease has ended
                _log.warning("the leases of jobs cannot be renewed: %s", error)

    def _renew(self) -> None:
        """Renew the lease of the running job, if it is still this server's."""
        with self._leasing:
            if self._lease is None:
                return
            job_id, now = self._lease[0], time.monotonic()
            job = self._table.renew(job_id)
            self._lease = (job_id, now + LEASE_SECONDS) if job else None
            if job and job.cancelling:
                self._cancelled.add(job_id)


def _describe(error: MasqueradeError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "param": error.param}
