"""The table of batches: uploaded files of requests that the server answers in the background."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select, update

from masquerade.database.group import TableGroup
from masquerade.database.tables import BATCH, FILE
from masquerade.errors import (
    BatchNotFound,
    InvalidValue,
    LeaseLost,
    QuotaExceeded,
    StateConflict,
    UploadNotFound,
)
from masquerade.jobs.records import LEASE_SECONDS, Quotas, Repeat

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
# OpenAI's states. A batch whose server dies keeps its state, and the next server goes on from there.
BATCH_TRANSITIONS: Mapping[BatchState, frozenset[BatchState]] = {
    "validating": frozenset({"in_progress", "failed", "cancelling"}),
    "in_progress": frozenset({"finalizing", "expired", "failed", "cancelling"}),
    "finalizing": frozenset({"completed"}),
    "cancelling": frozenset({"cancelled"}),
    "failed": frozenset(),
    "completed": frozenset(),
    "expired": frozenset(),
    "cancelled": frozenset(),
}
OPEN_STATES = frozenset(state for state, following in BATCH_TRANSITIONS.items() if following)
WINDOW_SECONDS = 86_400.0  # from the creation of a batch to its expiry
_IS_OPEN = BATCH.c.state.in_(sorted(OPEN_STATES))
_LAST = 2**63 - 1  # greater than every rowid


@dataclass(frozen=True)
class BatchRecord:
    """A batch. Times are unix seconds; `times` has when each state after the first began."""

    id: str
    owner: str
    state: BatchState
    endpoint: str
    input_file: str
    metadata: Mapping[str, str] | None
    created_at: float
    times: Mapping[BatchState, float]
    total: int  # requests; 0 until they are counted
    completed: int
    failed: int
    output_file: str | None
    error_file: str | None
    errors: Sequence[Mapping[str, Any]]  # why it failed, as OpenAI's `errors.data`
    key: str | None = None  # the client's idempotency key

    @property
    def expires_at(self) -> float:
        """When the rest of its requests is given up."""
        return self.created_at + WINDOW_SECONDS

    @property
    def is_open(self) -> bool:
        """Whether the batch has not ended."""
        return self.state in OPEN_STATES


_COLUMNS = [BATCH.c[name] for name in BatchRecord.__dataclass_fields__]


class BatchTable:
    """Batches, in the database of the jobs. Threads and processes may use it at the same time.

    It belongs to one `worker`, a server. Where several share the tables, a batch is its server's for `LEASE_SECONDS`
    after it was added, claimed or renewed.
    """

    def __init__(self, group: TableGroup, quotas: Quotas, worker: str = "") -> None:
        self.group = group
        self._quotas = quotas
        self._worker = worker

    def add(
        self, owner: str, endpoint: str, input_file: str, metadata: Mapping[str, str] | None, repeat: Repeat
    ) -> BatchRecord:
        """Add a batch in the first state; the earlier one if the request repeats the one that made it.

        It does if both have the same key; or the same fields, and the batch is open or, for a retry, young. Raises
        `QuotaExceeded`, `InvalidValue` if the key was used with other fields, and `UploadNotFound` if the file has been
        deleted.
        """
        fields = (endpoint, input_file, json.dumps(metadata))
        with self.group.write() as db:
            if known := self._find_repeated(db, owner, fields, repeat):
                return known
            count = db.execute(select(func.count()).where(BATCH.c.owner == owner, _IS_OPEN)).scalar_one()
            if count >= self._quotas.open_jobs:
                raise QuotaExceeded(f"{count} batches are unfinished, which is the limit; wait, or cancel one")
            check_file(db, input_file, owner)
            batch_id = f"batch_{secrets.token_hex(12)}"
            row = {"id": batch_id, "owner": owner, "state": "validating", "created_at": time.time()}
            row |= dict(zip(("endpoint", "input_file", "metadata"), fields, strict=True))
            db.execute(insert(BATCH).values(**row, key=repeat.key, **self._lease(db)))
            return _get(db, batch_id)

    def get(self, batch_id: str, owner: str | None = None) -> BatchRecord:
        """A batch. Raises `BatchNotFound` if it does not exist, or is not the owner's where one is given."""
        with self.group.read() as db:
            batch = _get(db, batch_id)
        if owner is not None and batch.owner != owner:
            raise BatchNotFound(f"there is no batch {batch_id!r:.80}")
        return batch

    def list(self, owner: str, after: str | None = None, limit: int = 20) -> tuple[Sequence[BatchRecord], bool]:
        """An owner's batches, the newest first, after one of them; and whether there are more."""
        own, newest = BATCH.c.owner == owner, BATCH.c.rowid.desc()
        with self.group.read() as db:
            place = select(BATCH.c.rowid).where(own, BATCH.c.id == after)
            behind = db.execute(place).scalar() if after is not None else _LAST
            if behind is None:
                raise BatchNotFound(f"there is no batch {after!r:.80} to go on from", param="after")
            batches = _select(db, own, BATCH.c.rowid < behind, order=newest, limit=limit + 1)
        return batches[:limit], len(batches) > limit

    def open_batches(self) -> Sequence[BatchRecord]:
        """The unfinished batches of all owners, the oldest first."""
        with self.group.read() as db:
            return _select(db, _IS_OPEN)

    def claim_open(self) -> Sequence[BatchRecord]:
        """The unfinished batches that this server runs, the oldest first, with renewed leases.

        Those of servers that have lost their leases are among them from now on.
        """
        with self.group.write() as db:
            if not self.group.shared:
                return _select(db, _IS_OPEN)
            own = and_(_IS_OPEN, or_(BATCH.c.worker == self._worker, self._lost(db)))
            db.execute(update(BATCH).where(own).values(**self._lease(db)))
            return _select(db, _IS_OPEN, BATCH.c.worker == self._worker)

    def release(self) -> None:
        """Let other servers claim the batches of this one at once."""
        with self.group.write() as db:
            db.execute(update(BATCH).where(BATCH.c.worker == self._worker).values(worker=None, lease_until=None))

    def claim(self, batch_id: str) -> None:
        """Make a batch this server's, or renew its lease. Raises `LeaseLost` if another server runs it."""
        if not self.group.shared:
            return
        with self.group.write() as db:
            free = BATCH.c.id == batch_id, or_(BATCH.c.worker == self._worker, self._lost(db))
            if not db.execute(update(BATCH).where(*free).values(**self._lease(db))).rowcount:
                raise LeaseLost(f"another server runs the batch {batch_id} now")

    def find_repeated(
        self, owner: str, endpoint: str, input_file: str, metadata: Mapping[str, str] | None, repeat: Repeat
    ) -> BatchRecord | None:
        """The batch that `add` would return instead of a new one. Raises `InvalidValue` as that does."""
        with self.group.read() as db:
            return self._find_repeated(db, owner, (endpoint, input_file, json.dumps(metadata)), repeat)

    def count_batches(self) -> Mapping[str, int]:
        """State -> number of batches."""
        with self.group.read() as db:
            rows = db.execute(select(BATCH.c.state, func.count()).group_by(BATCH.c.state))
            found = {row.state: row[1] for row in rows}
        return {state: found.get(state, 0) for state in BATCH_TRANSITIONS}

    def set_state(self, batch_id: str, state: BatchState, **columns: Any) -> BatchRecord:
        """Change the state, and other columns. Raises `StateConflict` if the present state does not allow that.

        Raises `LeaseLost` if another server runs the batch.
        """
        with self.group.write() as db:
            self._check_lease(db, batch_id)
            return self._set_state(db, _get(db, batch_id), state, columns)

    def ask_to_cancel(self, batch_id: str) -> BatchRecord:
        """Change the state to `cancelling`, unless it is that already. Raises `StateConflict` after the end."""
        with self.group.write() as db:
            batch = _get(db, batch_id)
            return batch if batch.state == "cancelling" else self._set_state(db, batch, "cancelling", {})

    def set_counts(self, batch_id: str, completed: int, failed: int) -> None:
        """Record how many requests have been answered. Raises `LeaseLost` if another server runs the batch."""
        with self.group.write() as db:
            self._check_lease(db, batch_id)
            _update(db, batch_id, {"completed": completed, "failed": failed})

    def _set_state(
        self, db: Connection, batch: BatchRecord, state: BatchState, columns: Mapping[str, Any]
    ) -> BatchRecord:
        if state not in BATCH_TRANSITIONS[batch.state]:
            raise StateConflict(f"the batch {batch.id} is {batch.state}; it cannot be {state}")
        times = json.dumps({**batch.times, state: time.time()})
        _update(db, batch.id, {"state": state, "times": times, **columns})
        return _get(db, batch.id)

    def _lease(self, db: Connection) -> Mapping[str, Any]:
        """The columns of a lease that begins now."""
        if not self.group.shared:
            return {}
        return {"worker": self._worker, "lease_until": self.group.now(db) + LEASE_SECONDS}

    def _lost(self, db: Connection) -> ColumnElement[bool]:
        return or_(BATCH.c.lease_until.is_(None), BATCH.c.lease_until < self.group.now(db))

    def _check_lease(self, db: Connection, batch_id: str) -> None:
        worker = db.execute(select(BATCH.c.worker).where(BATCH.c.id == batch_id)).scalar()
        if self.group.shared and worker != self._worker:
            raise LeaseLost(f"another server runs the batch {batch_id} now")

    def _find_repeated(
        self, db: Connection, owner: str, fields: tuple[str, str, str], repeat: Repeat
    ) -> BatchRecord | None:
        own = BATCH.c.owner == owner
        keyed = _select(db, own, BATCH.c.key == repeat.key) if repeat.key is not None else ()
        if keyed and (keyed[0].endpoint, keyed[0].input_file, json.dumps(keyed[0].metadata)) != fields:
            raise InvalidValue(
                f"the key {repeat.key!r:.80} was used for another request, for {keyed[0].id}", param="Idempotency-Key"
            )
        endpoint, input_file, metadata = fields
        same = BATCH.c.endpoint == endpoint, BATCH.c.input_file == input_file, BATCH.c.metadata == metadata
        young = or_(_IS_OPEN, BATCH.c.created_at > repeat.since(time.time()))
        unkeyed = own, BATCH.c.key.is_not_distinct_from(repeat.key), *same, young
        return next(iter(keyed or _select(db, *unkeyed, order=BATCH.c.rowid.desc())), None)


def find_user(db: Connection, file_id: str) -> str | None:
    """The id of an unfinished batch that reads a file, or None."""
    return db.execute(select(BATCH.c.id).where(BATCH.c.input_file == file_id, _IS_OPEN).limit(1)).scalar()


def check_file(db: Connection, file_id: str, owner: str) -> None:
    """Raises `UploadNotFound` if an owner has no file of this id, which then stays until the transaction ends."""
    if db.execute(select(FILE.c.id).where(FILE.c.id == file_id, FILE.c.owner == owner)).first() is None:
        raise UploadNotFound(f"there is no file {file_id!r:.80}")


def expire(db: Connection, horizon: float) -> None:
    """Delete the batches that have ended and were made before a time."""
    db.execute(delete(BATCH).where(BATCH.c.created_at < horizon, ~_IS_OPEN))


def _update(db: Connection, batch_id: str, columns: Mapping[str, Any]) -> None:
    values = {name: json.dumps(value) if isinstance(value, list) else value for name, value in columns.items()}
    db.execute(update(BATCH).where(BATCH.c.id == batch_id).values(**values))


def _get(db: Connection, batch_id: str) -> BatchRecord:
    found = _select(db, BATCH.c.id == batch_id)
    if not found:
        raise BatchNotFound(f"there is no batch {batch_id!r:.80}")
    return found[0]


def _select(
    db: Connection,
    *wanted: ColumnElement[bool],
    order: ColumnElement[Any] = BATCH.c.rowid,
    limit: int | None = None,
) -> Sequence[BatchRecord]:
    rows = db.execute(select(*_COLUMNS).where(*wanted).order_by(order).limit(limit)).mappings()
    return [_read({**row}) for row in rows]


def _read(row: dict[str, Any]) -> BatchRecord:
    return BatchRecord(**row | {name: json.loads(row[name]) for name in ("metadata", "times", "errors")})
