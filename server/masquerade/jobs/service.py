"""The uploads, tables and runner of a store, locked for one process."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from masquerade.errors import WorkedElsewhere
from masquerade.jobs.batches import BatchTable
from masquerade.jobs.records import Job, Quotas
from masquerade.jobs.responses import ResponseTable
from masquerade.jobs.runner import Execute, Runner, Work
from masquerade.jobs.table import JobTable
from masquerade.jobs.uploads import Uploads

FILE_BYTES = 2**28  # most bytes of one uploaded file


class JobService:
    """Uploads, tables and runner below a folder, with a lock that the kernel releases when the process dies.

    `sweep` deletes what ended jobs left elsewhere; it is called with the service at the start and every hour. Raises
    `WorkedElsewhere` if another process has the lock.
    """

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[JobService, Job], Work],
        execute: Execute,
        quotas: Quotas | None = None,
        sweep: Callable[[JobService], None] = lambda _: None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / "lock")
        self.table = JobTable(folder / "jobs.sqlite", quotas)
        self.batches = BatchTable(self.table.database, self.table.quotas)
        self.results = folder / "batches"  # of `BatchResults`
        self.uploads = Uploads(folder / "files", self.table, FILE_BYTES)
        self.responses = ResponseTable(self.table.database.path, self.table.quotas)
        self._sweep = sweep
        self.tidy()
        self.runner = Runner(self.table, lambda job: prepare(self, job), execute, self.tidy)

    def tidy(self) -> None:
        """Delete expired files, jobs and responses, and what ended jobs left."""
        self.uploads.expire(time.time())
        self.responses.expire(time.time())
        self._sweep(self)

    def close(self) -> None:
        """Stop the runner, close the table of responses and release the lock."""
        self.runner.stop()
        self.responses.close()
        self._lock.close()


def _lock(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise WorkedElsewhere("another server works the jobs of this store; send builds there") from None
    return file
