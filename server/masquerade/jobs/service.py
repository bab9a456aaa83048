"""The uploads, tables and runner of a store."""

from __future__ import annotations

import fcntl
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from masquerade.database.group import TableGroup
from masquerade.database.postgresql import PostgreSQL
from masquerade.errors import UnusableStore, WorkedElsewhere
from masquerade.jobs.batches import BatchTable
from masquerade.jobs.records import Job, Quotas
from masquerade.jobs.responses import ResponseTable, open_responses
from masquerade.jobs.runner import Execute, Runner, Work
from masquerade.jobs.table import JobTable, open_group
from masquerade.jobs.uploads import Uploads

FILE = "jobs.sqlite"
FILE_BYTES = 2**28  # most bytes of one uploaded file


class JobService:
    """Uploads, tables and runner below a folder, with a lock that the kernel releases when the process dies.

    With a `database`, the tables are there, and other servers of the store may use them and the folder at the same
    time: leases decide who runs a job. Without one, raises `WorkedElsewhere` if another process has the lock.
    `sweep` deletes what ended jobs left elsewhere; it is called with the service at the start and every hour.
    """

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[JobService, Job], Work],
        execute: Execute,
        quotas: Quotas | None = None,
        sweep: Callable[[JobService], None] = lambda _: None,
        database: PostgreSQL | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder if database is None else _find_folder(database, folder)
        self._lock = _lock(folder / "lock", shared=database is not None)
        jobs: TableGroup
        responses: TableGroup
        if database is None:
            jobs, responses = open_group(folder / FILE), open_responses(folder / FILE)
        else:
            jobs, responses = database.group("jobs"), database.group("responses", durable=False)
        self.table = JobTable(jobs, quotas)
        self.batches = BatchTable(jobs, self.table.quotas, self.table.worker)
        self.results = place / "batches"  # of `BatchResults`
        self.uploads = Uploads(place / "files", self.table, FILE_BYTES)
        self.responses = ResponseTable(responses, self.table.quotas)
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


def _find_folder(database: PostgreSQL, folder: Path) -> Path:
    """The folder, below one of a store, of the content of a database's files; created for a new database.

    Raises `UnusableStore` if the database is another store's, whose jobs could not find their files here.
    """
    store, new = database.bind_store(secrets.token_hex(8), lambda store: (folder / store).mkdir())
    if not new and not (folder / store).is_dir():
        raise UnusableStore(
            f"the database {database.url} belongs to a store with the folder jobs/{store}, which {folder.parent} does "
            "not have; use that store, or another database (an empty schema is enough)"
        )
    return folder / store


def _lock(path: Path, *, shared: bool) -> IO[bytes]:
    """Lock a folder; all its servers with databases share the lock."""
    file = path.open("ab")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        where = " without --database; stop it first" if shared else "; send builds there"
        raise WorkedElsewhere(f"another server works the jobs of this store{where}") from None
    return file
