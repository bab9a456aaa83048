"""Stored responses of `/v1/responses`, in the SQLite file of the jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskstore.sqlite import SQLiteFile
from masquerade.errors import ResponseNotFound, StoreTooNew
from masquerade.jobs.records import Quotas
from masquerade.jobs.table import BUSY_SECONDS, MIGRATIONS

Json = dict[str, Any]

_FIELDS = "select body, input from response where id = ? and owner = ? and created_at >= ?"
_OUTPUT = "select json_extract(body, '$.output') from response where id = ? and owner = ? and created_at >= ?"
_SIZE = "select count(*), coalesce(sum(bytes), 0) from response where owner = ?"
_OLDEST = "select rowid, bytes from response where owner = ? order by created_at limit 1"


@dataclass(frozen=True)
class StoredResponse:
    """A response, and all items that the model was given for it, those of earlier responses included."""

    body: Json
    input: Sequence[Json]


class ResponseTable:
    """Responses by owner, for the days of the quotas. Threads and processes may use it at the same time.

    A power failure may undo the last changes; what is stored is there for every process at once.
    """

    def __init__(self, path: Path, quotas: Quotas) -> None:
        self.quotas = quotas
        self._database = SQLiteFile(path, MIGRATIONS, StoreTooNew, timeout=BUSY_SECONDS, wal=True, durable=False)
        # While a connection is open, closing another one does not copy the log into the file, for which it would wait.
        self._kept = self._database.connect()
        self._kept.execute("select 1 from response limit 1").fetchone()

    def close(self) -> None:
        """Copy the log into the file, if no other process uses it. Has no effect when repeated."""
        self._kept.close()

    def add(self, owner: str, response: StoredResponse) -> None:
        """Store a response under its id. The owner's oldest ones are deleted beyond the quotas of number and bytes."""
        body, items = _write(response.body), _write(response.input)
        size, now = len(body.encode()) + len(items.encode()), time.time()
        with self._database.write() as db:
            row = (response.body["id"], owner, size, now, body, items)
            db.execute(
                "insert into response (id, owner, bytes, created_at, body, input) values (?, ?, ?, ?, ?, ?)", row
            )
            count, total = db.execute(_SIZE, (owner,)).fetchone()
            while count > self.quotas.responses or total > self.quotas.response_bytes:
                oldest, size = db.execute(_OLDEST, (owner,)).fetchone()
                db.execute("delete from response where rowid = ?", (oldest,))
                count, total = count - 1, total - size

    def get(self, response_id: str, owner: str, param: str | None = None) -> StoredResponse:
        """A response of an owner. Raises `ResponseNotFound`, with the request's field `param`."""
        with self._database.read() as db:
            row = db.execute(_FIELDS, (response_id, owner, self._horizon(time.time()))).fetchone()
        if row is None:
            raise ResponseNotFound(f"there is no response {response_id!r:.80}", param=param)
        return StoredResponse(*map(json.loads, row))

    def get_output(self, response_id: str, owner: str) -> list[Json]:
        """The output of a response of an owner; empty if there is no such response."""
        with self._database.read() as db:
            row = db.execute(_OUTPUT, (response_id, owner, self._horizon(time.time()))).fetchone()
        output: list[Json] = json.loads(row[0]) if row else []
        return output

    def remove(self, response_id: str, owner: str) -> None:
        """Delete a response of an owner. Raises `ResponseNotFound`."""
        with self._database.write() as db:
            fields = response_id, owner, self._horizon(time.time())
            deleted = db.execute("delete from response where id = ? and owner = ? and created_at >= ?", fields).rowcount
        if not deleted:
            raise ResponseNotFound(f"there is no response {response_id!r:.80}")

    def expire(self, now: float) -> None:
        """Delete the responses of all owners that are older than the quota's days."""
        with self._database.write() as db:
            db.execute("delete from response where created_at < ?", (self._horizon(now),))

    def _horizon(self, now: float) -> float:
        return now - self.quotas.response_days * 86_400


def _write(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
