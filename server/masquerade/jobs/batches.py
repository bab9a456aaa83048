"""The table of batches: uploaded files of requests that the server answers in the background."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from maskstore.sqlite import SQLiteFile
from masquerade.errors import BatchNotFound, InvalidValue, QuotaExceeded, StateConflict
from masquerade.jobs.records import Quotas, Repeat

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
_OPEN = f"state in ({', '.join(repr(state) for state in sorted(OPEN_STATES))})"
_LAST = 2**63 - 1  # greater than every rowid
_COLUMNS = (
    "id, owner, state, endpoint, input_file, metadata, created_at, times, total, completed, failed, output_file, "
    "error_file, errors, key"
)


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


class BatchTable:
    """Batches, in the database of the jobs. Threads and processes may use it at the same time."""

    def __init__(self, database: SQLiteFile, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas

    def add(
        self, owner: str, endpoint: str, input_file: str, metadata: Mapping[str, str] | None, repeat: Repeat
    ) -> BatchRecord:
        """Add a batch in the first state; the earlier one if the request repeats the one that made it.

        It does if both have the same key; or the same fields, and the batch is open or, for a retry, young. Raises
        `QuotaExceeded`, and `InvalidValue` if the key was used with other fields.
        """
        fields = (endpoint, input_file, json.dumps(metadata))
        with self._database.write() as db:
            if known := self._find_repeated(db, owner, fields, repeat):
                return known
            (count,) = db.execute(f"select count(*) from batch where owner = ? and {_OPEN}", (owner,)).fetchone()
            if count >= self._quotas.open_jobs:
                raise QuotaExceeded(f"{count} batches are unfinished, which is the limit; wait, or cancel one")
            batch_id = f"batch_{secrets.token_hex(12)}"
            db.execute(
                "insert into batch (id, owner, state, endpoint, input_file, metadata, created_at, key) "
                "values (?, ?, 'validating', ?, ?, ?, ?, ?)",
                (batch_id, owner, *fields, time.time(), repeat.key),
            )
            return _get(db, batch_id)

    def get(self, batch_id: str, owner: str | None = None) -> BatchRecord:
        """A batch. Raises `BatchNotFound` if it does not exist, or is not the owner's where one is given."""
        with self._database.read() as db:
            batch = _get(db, batch_id)
        if owner is not None and batch.owner != owner:
            raise BatchNotFound(f"there is no batch {batch_id!r:.80}")
        return batch

    def list(self, owner: str, after: str | None = None, limit: int = 20) -> tuple[Sequence[BatchRecord], bool]:
        """An owner's batches, the newest first, after one of them; and whether there are more."""
        with self._database.read() as db:
            row = db.execute("select rowid from batch where owner = ? and id = ?", (owner, after)).fetchone()
            if after is not None and row is None:
                raise BatchNotFound(f"there is no batch {after!r:.80} to go on from", param="after")
            clause = "owner = ? and rowid < ? order by rowid desc limit ?"
            batches = _select(db, clause, owner, row[0] if row else _LAST, limit + 1)
        return batches[:limit], len(batches) > limit

    def open_batches(self) -> Sequence[BatchRecord]:
        """The unfinished batches of all owners, the oldest first."""
        with self._database.read() as db:
            return _select(db, f"{_OPEN} order by rowid")

    def count_batches(self) -> Mapping[str, int]:
        """State -> number of batches."""
        with self._database.read() as db:
            found = dict(db.execute("select state, count(*) from batch group by state").fetchall())
        return {state: found.get(state, 0) for state in BATCH_TRANSITIONS}

    def set_state(self, batch_id: str, state: BatchState, **columns: Any) -> BatchRecord:
        """Change the state, and other columns. Raises `StateConflict` if the present state does not allow that."""
        with self._database.write() as db:
            batch = _get(db, batch_id)
            if state not in BATCH_TRANSITIONS[batch.state]:
                raise StateConflict(f"the batch {batch_id} is {batch.state}; it cannot be {state}")
            times = json.dumps({**batch.times, state: time.time()})
            _update(db, batch_id, {"state": state, "times": times, **columns})
            return _get(db, batch_id)

    def ask_to_cancel(self, batch_id: str) -> BatchRecord:
        """Change the state to `cancelling`, unless it is that already. Raises `StateConflict` after the end."""
        batch = self.get(batch_id)
        return batch if batch.state == "cancelling" else self.set_state(batch_id, "cancelling")

    def set_counts(self, batch_id: str, completed: int, failed: int) -> None:
        """Record how many requests have been answered."""
        with self._database.write() as db:
            _update(db, batch_id, {"completed": completed, "failed": failed})

    def _find_repeated(
        self, db: sqlite3.Connection, owner: str, fields: tuple[str, str, str], repeat: Repeat
    ) -> BatchRecord | None:
        keyed = _select(db, "owner = ? and key = ?", owner, repeat.key)
        if keyed and (keyed[0].endpoint, keyed[0].input_file, json.dumps(keyed[0].metadata)) != fields:
            raise InvalidValue(
                f"the key {repeat.key!r:.80} was used for another request, for {keyed[0].id}", param="Idempotency-Key"
            )
        clause = "owner = ? and key is ? and endpoint = ? and input_file = ? and metadata = ?"
        clause += f" and ({_OPEN} or created_at > ?) order by rowid desc"
        since = repeat.since(time.time())
        return next(iter(keyed or _select(db, clause, owner, repeat.key, *fields, since)), None)


def find_user(db: sqlite3.Connection, file_id: str) -> str | None:
    """The id of an unfinished batch that reads a file, or None."""
    row = db.execute(f"select id from batch where input_file = ? and {_OPEN}", (file_id,)).fetchone()
    return row[0] if row else None


def expire(db: sqlite3.Connection, horizon: float) -> None:
    """Delete the batches that have ended and were made before a time."""
    db.execute(f"delete from batch where created_at < ? and not {_OPEN}", (horizon,))


def _update(db: sqlite3.Connection, batch_id: str, columns: Mapping[str, Any]) -> None:
    names = ", ".join(f"{name} = ?" for name in columns)
    values = [json.dumps(value) if isinstance(value, list) else value for value in columns.values()]
    db.execute(f"update batch set {names} where id = ?", (*values, batch_id))


def _get(db: sqlite3.Connection, batch_id: str) -> BatchRecord:
    found = _select(db, "id = ?", batch_id)
    if not found:
        raise BatchNotFound(f"there is no batch {batch_id!r:.80}")
    return found[0]


def _select(db: sqlite3.Connection, clause: str, *values: Any) -> Sequence[BatchRecord]:
    rows = db.execute(f"select {_COLUMNS} from batch where {clause}", values).fetchall()
    return [_read(dict(zip(_COLUMNS.split(", "), row, strict=True))) for row in rows]


def _read(row: dict[str, Any]) -> BatchRecord:
    return BatchRecord(**row | {name: json.loads(row[name]) for name in ("metadata", "times", "errors")})
