"""The tables of files, jobs and events; every change is one transaction."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, or_, select, update

from masquerade.database.group import TableGroup
from masquerade.database.migrations import JOBS
from masquerade.database.sqlite import SQLiteGroup
from masquerade.database.tables import EVENT, FILE, JOB
from masquerade.errors import InvalidValue, JobNotFound, LeaseLost, QuotaExceeded, StateConflict
from masquerade.jobs import batches
from masquerade.jobs.records import (
    BATCH_OUTPUT,
    LEASE_SECONDS,
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

BUSY_SECONDS = 30.0
LAST = 2**63 - 1  # greater than every rowid and event number
TYPICAL = 5  # ended jobs that the estimate of a duration takes into account
_FILE = [FILE.c[name] for name in File.__dataclass_fields__]
_JOB = [JOB.c[name] for name in Job.__dataclass_fields__]
_EVENT = [EVENT.c[name] for name in Event.__dataclass_fields__]
_IS_OPEN = JOB.c.state.in_(sorted(OPEN))
_RUNNING = JOB.c.state == "running"
_PAST = JOB.alias("past")
_LAST_START = select(func.coalesce(func.max(_PAST.c.started_at), 0)).where(_PAST.c.owner == JOB.c.owner)
_NEXT = select(JOB.c.id).where(JOB.c.state == "queued").order_by(_LAST_START.scalar_subquery(), JOB.c.rowid).limit(1)


def open_group(path: Path) -> SQLiteGroup:
    """The tables of jobs and batches in a SQLite file."""
    return SQLiteGroup(path, JOBS, timeout=BUSY_SECONDS)


class JobTable:
    """Files, jobs and events. Threads and processes may use it at the same time; each call is one transaction.

    It belongs to one `worker`, the server whose jobs it takes, renews and finishes. Where several servers share the
    tables, a running job is its server's for `LEASE_SECONDS` after each `renew`.
    """

    def __init__(self, group: TableGroup, quotas: Quotas | None = None) -> None:
        self.quotas = quotas or Quotas()
        self.group = group
        self.worker = secrets.token_hex(8)

    def add_file(
        self, owner: str, purpose: str, name: str, size: int, digest: str, file_id: str, *, tentative: bool = False
    ) -> File:
        """Add a file. Raises `QuotaExceeded`, unless a job or batch made it: files of batches count afterwards."""
        file = File(file_id, owner, purpose, name, size, digest, time.time())
        with self.group.write() as db:
            if purpose not in (RESULTS, BATCH_OUTPUT):
                self._check_room(db, owner, size)
            db.execute(insert(FILE).values(**vars(file), claims=int(tentative)))
        return file

    def get_file(self, file_id: str, owner: str) -> File:
        """A file of an owner; raises `UploadNotFound` if the owner has none with this id."""
        with self.group.read() as db:
            batches.check_file(db, file_id, owner)
            return File(*db.execute(select(*_FILE).where(FILE.c.id == file_id)).one())

    def name_file(self, file_id: str) -> str:
        """The name that a file was uploaded with."""
        with self.group.read() as db:
            name: str | None = db.execute(select(FILE.c.name).where(FILE.c.id == file_id)).scalar()
        return name or file_id

    def find_file(self, owner: str, purpose: str, name: str, digest: str) -> File | None:
        """An owner's file of this name and content, or None."""
        with self.group.read() as db:
            return _find_file(db, owner, purpose, name, digest)

    def claim_file(self, owner: str, purpose: str, name: str, digest: str, *, tentative: bool) -> File | None:
        """As `find_file`, for an upload of the same file: it is as new as one of another content. Unless the upload is
        tentative, the file is confirmed.
        """
        with self.group.write() as db:
            file = _find_file(db, owner, purpose, name, digest)
            if file is None:
                return None
            file, same = replace(file, created_at=time.time()), FILE.c.id == file.id
            db.execute(update(FILE).where(same).values(created_at=file.created_at))
            if tentative:
                db.execute(update(FILE).where(same, FILE.c.claims > 0).values(claims=FILE.c.claims + 1))
            else:
                db.execute(update(FILE).where(same).values(claims=0))
        return file

    def confirm_file(self, file_id: str) -> None:
        """Keep a tentative file."""
        with self.group.write() as db:
            db.execute(update(FILE).where(FILE.c.id == file_id).values(claims=0))

    def discard_file(self, file_id: str) -> bool:
        """Give up a claim on a tentative file; whether it was the last one, and the file's row is deleted.

        It stays, confirmed, if an unfinished job or batch needs it.
        """
        with self.group.write() as db:
            row = db.execute(select(*_FILE, FILE.c.claims).where(FILE.c.id == file_id)).first()
            if row is None or row.claims == 0:
                return False
            needed = row.claims == 1 and self._find_user(db, file_id, row.owner) is not None
            if row.claims > 1 or needed:
                db.execute(update(FILE).where(FILE.c.id == file_id).values(claims=0 if needed else row.claims - 1))
                return False
            db.execute(delete(FILE).where(FILE.c.id == file_id))
        return True

    def list_files(self, owner: str, purpose: str | None = None) -> list[File]:
        """An owner's files, of a purpose if one is given, the newest first."""
        wanted = [FILE.c.owner == owner, *([] if purpose is None else [FILE.c.purpose == purpose])]
        with self.group.read() as db:
            return [File(*row) for row in db.execute(select(*_FILE).where(*wanted).order_by(FILE.c.rowid.desc()))]

    def known_files(self) -> set[str]:
        """The ids of all files."""
        with self.group.read() as db:
            return set(db.execute(select(FILE.c.id)).scalars())

    def remove_file(self, file_id: str, owner: str) -> None:
        """Delete a file's row. Raises `StateConflict` while an unfinished job or batch needs it."""
        self.get_file(file_id, owner)
        with self.group.write() as db:
            if user := self._find_user(db, file_id, owner):
                raise StateConflict(f"the file is needed by the {user}; cancel it first, or wait")
            db.execute(delete(FILE).where(FILE.c.id == file_id))

    def check_room(self, owner: str) -> None:
        """Raises `QuotaExceeded` if an owner's files, with those that batches made, have reached a limit."""
        with self.group.read() as db:
            self._check_room(db, owner, 0)

    def add_job(
        self, owner: str, spec: Mapping[str, Any], request: Repeat | None = None, job_id: str | None = None
    ) -> Job:
        """Queue a job, with a new id unless one is given. Raises `QuotaExceeded`, and `UploadNotFound` if a file of its
        spec has been deleted.

        If `request` repeats an earlier one, return the job of that one.
        """
        job_id = job_id or draw_job_id()
        with self.group.write() as db:
            if request and (known := self._find_repeated(db, owner, spec, request)):
                return known
            waiting = db.execute(select(func.count()).where(JOB.c.owner == owner, _IS_OPEN)).scalar_one()
            for file_id in spec["files"].values():
                batches.check_file(db, file_id, owner)
            if waiting >= self.quotas.open_jobs:
                raise QuotaExceeded(f"{waiting} jobs are unfinished, which is the limit; wait, or cancel one")
            fields = {"id": job_id, "owner": owner, "state": "queued", "spec": json.dumps(spec)}
            key = request.key if request else None
            db.execute(insert(JOB).values(**fields, created_at=time.time(), key=key))
            self._add_event(db, job_id, "info", "queued")
            return self._get(db, job_id)

    def find_repeated(self, owner: str, spec: Mapping[str, Any], request: Repeat) -> Job | None:
        """The job of the earlier request that this one repeats, or None.

        A request repeats another if both have the same key; if both have the same spec and the job is not finished;
        and, for a retry, if both have the same spec and the job is younger than `REPEAT_SECONDS`. Raises
        `InvalidValue` if the key was used with another spec.
        """
        with self.group.read() as db:
            return self._find_repeated(db, owner, spec, request)

    def get_job(self, job_id: str, owner: str | None = None) -> Job:
        """A job; raises `JobNotFound` if it does not exist, or is not the owner's where one is given."""
        with self.group.read() as db:
            job = self._get(db, job_id)
        if owner is not None and job.owner != owner:
            raise JobNotFound(f"there is no job {job_id!r:.80}")
        return job

    def list_jobs(self, owner: str, after: str | None = None, limit: int = 20) -> tuple[list[Job], bool]:
        """An owner's jobs, the newest first, after one of them; and whether there are more."""
        own = JOB.c.owner == owner
        with self.group.read() as db:
            behind = (
                db.execute(select(JOB.c.rowid).where(own, JOB.c.id == after)).scalar() if after is not None else LAST
            )
            if behind is None:
                raise JobNotFound(f"there is no job {after!r:.80} to go on from")
            jobs = self._jobs(db, own, JOB.c.rowid < behind, order=JOB.c.rowid.desc(), limit=limit + 1)
        return jobs[:limit], len(jobs) > limit

    def open_jobs(self) -> list[Job]:
        """The unfinished jobs of all owners, the oldest first."""
        with self.group.read() as db:
            return self._jobs(db, _IS_OPEN, order=JOB.c.rowid)

    def failed_jobs(self, codes: Collection[str], since: float) -> list[Job]:
        """The jobs of all owners that have failed with one of the error codes after a time, the newest first."""
        with self.group.read() as db:
            failed = self._jobs(db, JOB.c.state == "failed", JOB.c.finished_at > since, order=JOB.c.finished_at.desc())
        return [job for job in failed if job.error and job.error["code"] in codes]

    def typical_seconds(self) -> float | None:
        """Median duration of the last jobs that succeeded; None if there are none."""
        query = select(JOB.c.finished_at - JOB.c.started_at).where(JOB.c.state == "succeeded")
        with self.group.read() as db:
            found = db.execute(query.order_by(JOB.c.finished_at.desc()).limit(TYPICAL)).scalars().all()
        return median(found) if found else None

    def expire(self, now: float) -> tuple[list[str], list[str]]:
        """Delete ended jobs and batches, and files, that are older than the quota's days; return the ids of jobs and
        files. A file stays while an unfinished job or batch needs it.
        """
        horizon = now - self.quotas.days * 86_400
        with self.group.write() as db:
            needed = {file for job in self._jobs(db, _IS_OPEN) for file in job.spec["files"].values()}
            jobs = [job.id for job in self._jobs(db, JOB.c.finished_at < horizon)]
            old = db.execute(select(FILE.c.id).where(FILE.c.created_at < horizon)).scalars().all()
            files = [file for file in old if file not in needed and not batches.find_user(db, file)]
            batches.expire(db, horizon)
            for table, gone in ((JOB, jobs), (FILE, files)):
                for row_id in gone:
                    db.execute(delete(table).where(table.c.id == row_id))
        return jobs, files

    def count_jobs(self) -> Mapping[str, int]:
        """State -> number of jobs."""
        with self.group.read() as db:
            found = {row.state: row[1] for row in db.execute(select(JOB.c.state, func.count()).group_by(JOB.c.state))}
        return {state: found.get(state, 0) for state in TRANSITIONS}

    def has_next(self) -> bool:
        """Whether `take_next` has something to do."""
        with self.group.read() as db:
            waiting = or_(JOB.c.state == "queued", self._lost(db)) if self.group.shared else JOB.c.state == "queued"
            return db.execute(select(JOB.c.id).where(waiting).limit(1)).first() is not None

    def take_next(self) -> Job | None:
        """Start the next job: the oldest one of the owner whose last job started first.

        The jobs of a server that has lost its lease are queued again before that.
        """
        with self.group.write() as db:
            if self.group.shared:
                self._requeue(db, self._lost(db))
            job_id = db.execute(_NEXT).scalar()
            if job_id is None:
                return None
            lease = {"worker": self.worker, "lease_until": self.group.now(db) + LEASE_SECONDS}
            return self._set_state(db, job_id, "running", started_at=time.time(), **lease)

    def renew(self, job_id: str) -> Job | None:
        """Renew the lease of a running job, and return the job; None if it is no longer this server's."""
        own = JOB.c.id == job_id, JOB.c.worker == self.worker, _RUNNING
        with self.group.write() as db:
            db.execute(update(JOB).where(*own).values(lease_until=self.group.now(db) + LEASE_SECONDS))
            return next(iter(self._jobs(db, *own)), None)

    def finish(
        self,
        job_id: str,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Job:
        """End a job in a final state. Raises `StateConflict` if its present state does not allow that, and `LeaseLost`
        if another server runs it.
        """
        with self.group.write() as db:
            self._check_lease(db, job_id)
            return self._set_state(db, job_id, state, finished_at=time.time(), result=result, error=error)

    def ask_to_cancel(self, job_id: str) -> Job:
        """Cancel a job at once if it waits; if it runs, record the request for its runner.

        Raises `StateConflict` after its end.
        """
        with self.group.write() as db:
            job = self._get(db, job_id)
            if job.state != "running":
                return self._set_state(db, job_id, "cancelled", finished_at=time.time())
            if not job.cancelling:
                db.execute(update(JOB).where(JOB.c.id == job_id).values(cancelling=1))
                self._add_event(db, job_id, "info", "cancelling")
            return self._get(db, job_id)

    def requeue_running(self) -> list[str]:
        """Requeue the running jobs of a server that stopped or died, or end those to be cancelled; return their ids.

        Where servers share the tables, these are this server's, and those of servers that have lost their leases.
        """
        with self.group.write() as db:
            if self.group.shared:
                return self._requeue(db, or_(and_(_RUNNING, JOB.c.worker == self.worker), self._lost(db)))
            return self._requeue(db, _RUNNING)

    def add_event(self, job_id: str, level: Level, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Add an event. Raises `LeaseLost` if another server runs the job."""
        with self.group.write() as db:
            self._check_lease(db, job_id)
            self._add_event(db, job_id, level, message, data)

    def list_events(self, job_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """A job's events in order, after a number."""
        return self._events(EVENT.c.job == job_id, EVENT.c.number > after, order=EVENT.c.number, limit=limit)

    def last_events(self, job_id: str, before: int | None = None, limit: int = 20) -> tuple[list[Event], bool]:
        """A job's events, the newest first, before a number; and whether there are more."""
        behind = LAST if before is None else before
        newest = EVENT.c.number.desc()
        events = self._events(EVENT.c.job == job_id, EVENT.c.number < behind, order=newest, limit=limit + 1)
        return events[:limit], len(events) > limit

    def progress(self, job_id: str) -> Mapping[str, Any] | None:
        """The data of the last event that has any, or None."""
        last = self._events(EVENT.c.job == job_id, EVENT.c.data != "{}", order=EVENT.c.number.desc(), limit=1)
        return last[0].data if last else None

    def _events(self, *wanted: ColumnElement[bool], order: ColumnElement[Any], limit: int) -> list[Event]:
        with self.group.read() as db:
            rows = db.execute(select(*_EVENT).where(*wanted).order_by(order).limit(limit)).all()
        return [Event(**row._asdict() | {"data": json.loads(row.data)}) for row in rows]

    def _check_room(self, db: Connection, owner: str, size: int) -> None:
        query = select(func.count(), func.coalesce(func.sum(FILE.c.bytes), 0))
        count, total = db.execute(query.where(FILE.c.owner == owner, FILE.c.purpose != RESULTS)).one()
        if count >= self.quotas.files:
            raise QuotaExceeded(f"there are {count} files already, which is the limit; delete some first")
        if total + size > self.quotas.file_bytes:
            raise QuotaExceeded(
                f"{total} bytes of files and {size} more exceed the limit of {self.quotas.file_bytes}; "
                "delete some first"
            )

    def _find_user(self, db: Connection, file_id: str, owner: str) -> str | None:
        """The unfinished job or batch that needs a file, in words."""
        for job in self._jobs(db, JOB.c.owner == owner, _IS_OPEN):
            if file_id in job.spec["files"].values():
                return f"job {job.id}"
        batch = batches.find_user(db, file_id)
        return f"batch {batch}" if batch else None

    def _find_repeated(self, db: Connection, owner: str, spec: Mapping[str, Any], request: Repeat) -> Job | None:
        written = json.dumps(spec)
        own = JOB.c.owner == owner
        keyed = self._jobs(db, own, JOB.c.key == request.key) if request.key is not None else []
        if keyed and keyed[0].spec != json.loads(written):
            raise InvalidValue(
                f"the key {request.key!r:.80} was used for another request, for {keyed[0].id}", param="Idempotency-Key"
            )
        young = or_(_IS_OPEN, JOB.c.created_at > request.since(time.time()))
        same = own, JOB.c.key.is_not_distinct_from(request.key), JOB.c.spec == written, young
        return next(iter(keyed or self._jobs(db, *same, order=JOB.c.rowid.desc())), None)

    def _lost(self, db: Connection) -> ColumnElement[bool]:
        """Which jobs run on servers that have lost their leases."""
        ended = or_(JOB.c.lease_until.is_(None), JOB.c.lease_until < self.group.now(db))
        return and_(_RUNNING, ended)

    def _check_lease(self, db: Connection, job_id: str) -> None:
        worker = db.execute(select(JOB.c.worker).where(JOB.c.id == job_id, _RUNNING)).scalar()
        if self.group.shared and worker not in (None, self.worker):
            raise LeaseLost(f"another server runs the job {job_id} now")

    def _requeue(self, db: Connection, wanted: ColumnElement[bool]) -> list[str]:
        running = self._jobs(db, wanted)
        for job in running:
            if job.cancelling:
                self._set_state(db, job.id, "cancelled", finished_at=time.time())
            else:
                self._set_state(db, job.id, "queued", worker=None, lease_until=None)
                self._add_event(db, job.id, "warn", "the server stopped; the job goes on")
        return [job.id for job in running]

    def _set_state(self, db: Connection, job_id: str, state: State, **fields: Any) -> Job:
        """Change the state of a job; nothing else does."""
        current = self._get(db, job_id).state
        if state not in TRANSITIONS[current]:
            raise StateConflict(f"the job {job_id} is {current}; it cannot be {state}")
        values = {key: json.dumps(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
        db.execute(update(JOB).where(JOB.c.id == job_id).values(state=state, **values))
        if state != "queued":
            self._add_event(db, job_id, "error" if state == "failed" else "info", state)
        return self._get(db, job_id)

    def _get(self, db: Connection, job_id: str) -> Job:
        found = self._jobs(db, JOB.c.id == job_id)
        if not found:
            raise JobNotFound(f"there is no job {job_id!r:.80}")
        return found[0]

    def _jobs(
        self,
        db: Connection,
        *wanted: ColumnElement[bool],
        order: ColumnElement[Any] = JOB.c.rowid,
        limit: int | None = None,
    ) -> list[Job]:
        return [_read(row) for row in db.execute(select(*_JOB).where(*wanted).order_by(order).limit(limit)).all()]

    def _add_event(
        self, db: Connection, job_id: str, level: Level, message: str, data: Mapping[str, Any] | None = None
    ) -> None:
        fields = {"job": job_id, "created_at": time.time(), "level": level, "message": message}
        db.execute(insert(EVENT).values(**fields, data=json.dumps(data or {})))


def _find_file(db: Connection, owner: str, purpose: str, name: str, digest: str) -> File | None:
    named = FILE.c.owner == owner, FILE.c.purpose == purpose, FILE.c.name == name
    row = db.execute(select(*_FILE).where(*named, FILE.c.digest == digest).order_by(FILE.c.rowid).limit(1)).first()
    return File(*row) if row else None


def _read(row: Row[Any]) -> Job:
    loaded = {name: _load(getattr(row, name)) for name in ("spec", "error", "result")}
    return Job(**row._asdict() | loaded | {"cancelling": bool(row.cancelling)})


def _load(text: str | None) -> Any:
    return None if text is None else json.loads(text)
