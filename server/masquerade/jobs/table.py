"""The tables of files, jobs and events in one SQLite file; every change is one transaction."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from maskstore.sqlite import SQLiteFile
from masquerade.errors import InvalidValue, JobNotFound, QuotaExceeded, StateConflict, StoreTooNew, UploadNotFound
from masquerade.jobs import batches
from masquerade.jobs.records import (
    BATCH_OUTPUT,
    OPEN,
    RESULTS,
    TRANSITIONS,
    Event,
    File,
    Job,
    Level,
    Quotas,
    Repeat,
    State,
    draw_job_id,
)

FIRST = """
create table file (
    id text primary key, owner text not null, purpose text not null, name text not null, bytes integer not null,
    digest text not null, created_at real not null
) strict;
create table job (
    id text primary key, owner text not null, state text not null, spec text not null, created_at real not null,
    started_at real, finished_at real, error text, result text
) strict;
create table event (
    number integer primary key autoincrement, job text not null references job on delete cascade,
    created_at real not null, level text not null, message text not null, data text not null
) strict;
create index event_of_job on event (job, number);
"""
SECOND = """
alter table job add column key text;
alter table job add column cancelling integer not null default 0;
delete from job where json_extract(spec, '$.base') is null;
"""
RESPONSES = """
create table response (
    id text primary key, owner text not null, bytes integer not null, created_at real not null,
    body text not null, input text not null
) strict;
create index response_of_owner on response (owner, created_at, bytes);
create index response_by_age on response (created_at);
"""
BATCHES = """
create table batch (
    id text primary key, owner text not null, state text not null, endpoint text not null, input_file text not null,
    metadata text not null, created_at real not null, times text not null default '{}',
    total integer not null default 0, completed integer not null default 0, failed integer not null default 0,
    output_file text, error_file text, errors text not null default '[]', key text
) strict;
"""
MIGRATIONS = (FIRST, SECOND, RESPONSES, BATCHES)
_JOB = "id, owner, state, spec, created_at, started_at, finished_at, error, result, key, cancelling"
_OPEN = f"state in ({', '.join(repr(state) for state in sorted(OPEN))})"
_NEXT = """
select id from job where state = 'queued' order by
    (select coalesce(max(past.started_at), 0) from job as past where past.owner = job.owner), job.rowid
limit 1
"""
BUSY_SECONDS = 30.0
LAST = 2**63 - 1  # greater than every rowid and event number
TYPICAL = 5  # ended jobs that the estimate of a duration takes into account


class JobTable:
    """Files, jobs and events. Threads and processes may use it at the same time; each call is one transaction."""

    def __init__(self, path: Path, quotas: Quotas | None = None) -> None:
        self.quotas = quotas or Quotas()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = SQLiteFile(path, MIGRATIONS, StoreTooNew, timeout=BUSY_SECONDS, wal=True)

    def add_file(self, owner: str, purpose: str, name: str, size: int, digest: str, file_id: str) -> File:
        """Add a file. Raises `QuotaExceeded`, unless a job or batch made it: files of batches count afterwards."""
        file = File(file_id, owner, purpose, name, size, digest, time.time())
        with self.database.write() as db:
            if purpose not in (RESULTS, BATCH_OUTPUT):
                self._check_room(db, owner, size)
            db.execute("insert into file values (?, ?, ?, ?, ?, ?, ?)", tuple(vars(file).values()))
        return file

    def get_file(self, file_id: str, owner: str) -> File:
        """A file of an owner; raises `UploadNotFound` if the owner has none with this id."""
        with self.database.read() as db:
            row = db.execute("select * from file where id = ? and owner = ?", (file_id, owner)).fetchone()
        if row is None:
            raise UploadNotFound(f"there is no file {file_id!r:.80}")
        return File(*row)

    def find_file(self, owner: str, purpose: str, name: str, digest: str) -> File | None:
        """An owner's file of this name and content, or None."""
        with self.database.read() as db:
            row = db.execute(
                "select * from file where owner = ? and purpose = ? and name = ? and digest = ?",
                (owner, purpose, name, digest),
            ).fetchone()
        return File(*row) if row else None

    def list_files(self, owner: str, purpose: str | None = None) -> list[File]:
        """An owner's files, of a purpose if one is given, the newest first."""
        with self.database.read() as db:
            rows = db.execute(
                "select * from file where owner = ? and purpose = coalesce(?, purpose) order by rowid desc",
                (owner, purpose),
            ).fetchall()
        return [File(*row) for row in rows]

    def known_files(self) -> set[str]:
        """The ids of all files."""
        with self.database.read() as db:
            return {row[0] for row in db.execute("select id from file")}

    def remove_file(self, file_id: str, owner: str) -> None:
        """Delete a file's row. Raises `StateConflict` while an unfinished job or batch needs it."""
        self.get_file(file_id, owner)
        with self.database.write() as db:
            for job in self._jobs(db, f"where owner = ? and {_OPEN}", owner):
                if file_id in job.spec["files"].values():
                    raise StateConflict(f"the file is needed by the job {job.id}; cancel it first, or wait")
            if batch := batches.find_user(db, file_id):
                raise StateConflict(f"the file is needed by the batch {batch}; cancel it first, or wait")
            db.execute("delete from file where id = ?", (file_id,))

    def check_room(self, owner: str) -> None:
        """Raises `QuotaExceeded` if an owner's files, with those that batches made, have reached a limit."""
        with self.database.read() as db:
            self._check_room(db, owner, 0)

    def add_job(
        self, owner: str, spec: Mapping[str, Any], request: Repeat | None = None, job_id: str | None = None
    ) -> Job:
        """Queue a job, with a new id unless one is given. Raises `QuotaExceeded`.

        If `request` repeats an earlier one, return the job of that one.
        """
        job_id = job_id or draw_job_id()
        with self.database.write() as db:
            if request and (known := self._find_repeated(db, owner, spec, request)):
                return known
            (waiting,) = db.execute(f"select count(*) from job where owner = ? and {_OPEN}", (owner,)).fetchone()
            if waiting >= self.quotas.open_jobs:
                raise QuotaExceeded(f"{waiting} jobs are unfinished, which is the limit; wait, or cancel one")
            fields = (job_id, owner, "queued", json.dumps(spec), time.time(), request.key if request else None)
            db.execute("insert into job (id, owner, state, spec, created_at, key) values (?, ?, ?, ?, ?, ?)", fields)
            self._add_event(db, job_id, "info", "queued")
            return self._get(db, job_id)

    def find_repeated(self, owner: str, spec: Mapping[str, Any], request: Repeat) -> Job | None:
        """The job of the earlier request that this one repeats, or None.

        A request repeats another if both have the same key; if both have the same spec and the job is not finished;
        and, for a retry, if both have the same spec and the job is younger than `REPEAT_SECONDS`. Raises
        `InvalidValue` if the key was used with another spec.
        """
        with self.database.read() as db:
            return self._find_repeated(db, owner, spec, request)

    def get_job(self, job_id: str, owner: str | None = None) -> Job:
        """A job; raises `JobNotFound` if it does not exist, or is not the owner's where one is given."""
        with self.database.read() as db:
            job = self._get(db, job_id)
        if owner is not None and job.owner != owner:
            raise JobNotFound(f"there is no job {job_id!r:.80}")
        return job

    def list_jobs(self, owner: str, after: str | None = None, limit: int = 20) -> tuple[list[Job], bool]:
        """An owner's jobs, the newest first, after one of them; and whether there are more."""
        with self.database.read() as db:
            row = db.execute("select rowid from job where owner = ? and id = ?", (owner, after)).fetchone()
            if after is not None and row is None:
                raise JobNotFound(f"there is no job {after!r:.80} to go on from")
            behind = row[0] if row else LAST
            jobs = self._jobs(db, "where owner = ? and rowid < ? order by rowid desc limit ?", owner, behind, limit + 1)
        return jobs[:limit], len(jobs) > limit

    def open_jobs(self) -> list[Job]:
        """The unfinished jobs of all owners, the oldest first."""
        with self.database.read() as db:
            return self._jobs(db, f"where {_OPEN} order by rowid")

    def failed_jobs(self, code: str, since: float) -> list[Job]:
        """The jobs of all owners that have failed with an error code after a time, the newest first."""
        clause = "where state = 'failed' and json_extract(error, '$.code') = ? and finished_at > ?"
        with self.database.read() as db:
            return self._jobs(db, f"{clause} order by finished_at desc", code, since)

    def typical_seconds(self) -> float | None:
        """Median duration of the last jobs that succeeded; None if there are none."""
        with self.database.read() as db:
            rows = db.execute(
                "select finished_at - started_at from job where state = 'succeeded' order by finished_at desc limit ?",
                (TYPICAL,),
            ).fetchall()
        return median(row[0] for row in rows) if rows else None

    def expire(self, now: float) -> tuple[list[str], list[str]]:
        """Delete ended jobs and batches, and files, that are older than the quota's days; return the ids of jobs and
        files. A file stays while an unfinished job or batch needs it.
        """
        horizon = now - self.quotas.days * 86_400
        with self.database.write() as db:
            needed = {file for job in self._jobs(db, f"where {_OPEN}") for file in job.spec["files"].values()}
            jobs = [job.id for job in self._jobs(db, "where finished_at < ?", horizon)]
            old = db.execute("select id from file where created_at < ?", (horizon,)).fetchall()
            files = [row[0] for row in old if row[0] not in needed and not batches.find_user(db, row[0])]
            batches.expire(db, horizon)
            db.executemany("delete from job where id = ?", [(job,) for job in jobs])
            db.executemany("delete from file where id = ?", [(file,) for file in files])
        return jobs, files

    def count_jobs(self) -> Mapping[str, int]:
        """State -> number of jobs."""
        with self.database.read() as db:
            found = dict(db.execute("select state, count(*) from job group by state").fetchall())
        return {state: found.get(state, 0) for state in TRANSITIONS}

    def take_next(self) -> Job | None:
        """Start the next job: the oldest one of the owner whose last job started first."""
        with self.database.write() as db:
            row = db.execute(_NEXT).fetchone()
            return self._set_state(db, row[0], "running", started_at=time.time()) if row else None

    def finish(
        self,
        job_id: str,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Job:
        """End a job in a final state. Raises `StateConflict` if its present state does not allow that."""
        with self.database.write() as db:
            return self._set_state(db, job_id, state, finished_at=time.time(), result=result, error=error)

    def ask_to_cancel(self, job_id: str) -> Job:
        """Cancel a job at once if it waits; if it runs, record the request for its runner.

        Raises `StateConflict` after its end.
        """
        with self.database.write() as db:
            job = self._get(db, job_id)
            if job.state != "running":
                return self._set_state(db, job_id, "cancelled", finished_at=time.time())
            if not job.cancelling:
                db.execute("update job set cancelling = 1 where id = ?", (job_id,))
                self._add_event(db, job_id, "info", "cancelling")
            return self._get(db, job_id)

    def requeue_running(self) -> list[str]:
        """Requeue the running jobs of a server that stopped or died, or end those to be cancelled; return their ids."""
        with self.database.write() as db:
            running = self._jobs(db, "where state = 'running'")
            for job in running:
                if job.cancelling:
                    self._set_state(db, job.id, "cancelled", finished_at=time.time())
                else:
                    self._set_state(db, job.id, "queued")
                    self._add_event(db, job.id, "warn", "the server stopped; the job goes on")
        return [job.id for job in running]

    def add_event(self, job_id: str, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Add an event."""
        with self.database.write() as db:
            self._add_event(db, job_id, level, message, data)

    def list_events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """A job's events in order, after a number."""
        return self._events("job = ? and number > ? order by number limit ?", job_id, after, limit)

    def last_events(self, job_id: str, before: int | None = None, limit: int = 20) -> tuple[list[Event], bool]:
        """A job's events, the newest first, before a number; and whether there are more."""
        clause = "job = ? and number < ? order by number desc limit ?"
        events = self._events(clause, job_id, LAST if before is None else before, limit + 1)
        return events[:limit], len(events) > limit

    def progress(self, job_id: str) -> Mapping[str, Any] | None:
        """The data of the last event that has any, or None."""
        last = self._events("job = ? and data != '{}' order by number desc limit 1", job_id)
        return last[0].data if last else None

    def _events(self, clause: str, *values: Any) -> list[Event]:
        with self.database.read() as db:
            rows = db.execute(f"select * from event where {clause}", values).fetchall()
        return [Event(number, job, at, level, text, json.loads(data)) for number, job, at, level, text, data in rows]

    def _check_room(self, db: sqlite3.Connection, owner: str, size: int) -> None:
        sql = "select count(*), coalesce(sum(bytes), 0) from file where owner = ? and purpose != ?"
        count, total = db.execute(sql, (owner, RESULTS)).fetchone()
        if count >= self.quotas.files:
            raise QuotaExceeded(f"there are {count} files already, which is the limit; delete some first")
        if total + size > self.quotas.file_bytes:
            raise QuotaExceeded(
                f"{total} bytes of files and {size} more exceed the limit of {self.quotas.file_bytes}; "
                "delete some first"
            )

    def _find_repeated(
        self, db: sqlite3.Connection, owner: str, spec: Mapping[str, Any], request: Repeat
    ) -> Job | None:
        written = json.dumps(spec)
        keyed = self._jobs(db, "where owner = ? and key = ?", owner, request.key)
        if keyed and keyed[0].spec != json.loads(written):
            raise InvalidValue(
                f"the key {request.key!r:.80} was used for another request, for {keyed[0].id}", param="Idempotency-Key"
            )
        since = request.since(time.time())
        clause = f"where owner = ? and key is ? and spec = ? and ({_OPEN} or created_at > ?) order by rowid desc"
        return next(iter(keyed or self._jobs(db, clause, owner, request.key, written, since)), None)

    def _set_state(self, db: sqlite3.Connection, job_id: str, state: State, **fields: Any) -> Job:
        """Change the state of a job; nothing else does."""
        current = self._get(db, job_id).state
        if state not in TRANSITIONS[current]:
            raise StateConflict(f"the job {job_id} is {current}; it cannot be {state}")
        values = {"state": state} | {
            key: json.dumps(value) if isinstance(value, Mapping) else value for key, value in fields.items()
        }
        names = ", ".join(f"{name} = ?" for name in values)
        db.execute(f"update job set {names} where id = ?", (*values.values(), job_id))
        if state != "queued":
            self._add_event(db, job_id, "error" if state == "failed" else "info", state)
        return self._get(db, job_id)

    def _get(self, db: sqlite3.Connection, job_id: str) -> Job:
        found = self._jobs(db, "where id = ?", job_id)
        if not found:
            raise JobNotFound(f"there is no job {job_id!r:.80}")
        return found[0]

    def _jobs(self, db: sqlite3.Connection, clause: str, *values: Any) -> list[Job]:
        return [_read(row) for row in db.execute(f"select {_JOB} from job {clause}", values).fetchall()]

    def _add_event(
        self, db: sqlite3.Connection, job_id: str, level: Level, message: str, data: Mapping[str, Any] | None = None
    ) -> None:
        fields = (job_id, time.time(), level, message, json.dumps(data or {}))
        db.execute("insert into event (job, created_at, level, message, data) values (?, ?, ?, ?, ?)", fields)


def _read(row: tuple[Any, ...]) -> Job:
    job_id, owner, state, spec, created_at, started_at, finished_at, error, result, key, cancelling = row
    times = created_at, started_at, finished_at
    return Job(job_id, owner, state, json.loads(spec), *times, _load(error), _load(result), key, bool(cancelling))


def _load(text: str | None) -> Any:
    return None if text is None else json.loads(text)
