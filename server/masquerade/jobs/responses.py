"""Stored responses of `/v1/responses`, in the database of the jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select

from masquerade.database.group import TableGroup
from masquerade.database.migrations import JOBS
from masquerade.database.sqlite import SQLiteGroup
from masquerade.database.tables import RESPONSE
from masquerade.errors import ResponseNotFound
from masquerade.jobs.records import Quotas
from masquerade.jobs.table import BUSY_SECONDS

Json = dict[str, Any]


def open_responses(path: Path) -> SQLiteGroup:
    """The table of responses in the SQLite file of the jobs."""
    return SQLiteGroup(path, JOBS, timeout=BUSY_SECONDS, durable=False)


@dataclass(frozen=True)
class StoredResponse:
    """A response, and all items that the model was given for it, those of earlier responses included."""

    body: Json
    input: Sequence[Json]


class ResponseTable:
    """Responses by owner, for the days of the quotas. Threads and processes may use it at the same time.

    A power failure may undo the last changes; what is stored is there for every process at once.
    """

    def __init__(self, group: TableGroup, quotas: Quotas) -> None:
        self.quotas = quotas
        self._group = group

    def close(self) -> None:
        """Close what the group keeps open. Has no effect when repeated."""
        self._group.close()

    def add(self, owner: str, response: StoredResponse) -> None:
        """Store a response under its id. The owner's oldest ones are deleted beyond the quotas of number and bytes."""
        body, items = _write(response.body), _write(response.input)
        size, now = len(body.encode()) + len(items.encode()), time.time()
        row = {"id": response.body["id"], "owner": owner, "bytes": size, "created_at": now}
        own = RESPONSE.c.owner == owner
        kept = select(func.count(), func.coalesce(func.sum(RESPONSE.c.bytes), 0)).where(own)
        oldest = select(RESPONSE.c.id, RESPONSE.c.bytes).where(own).order_by(RESPONSE.c.created_at).limit(1)
        with self._group.write() as db:
            db.execute(insert(RESPONSE).values(**row, body=body, input=items))
            count, total = db.execute(kept).one()
            while count > self.quotas.responses or total > self.quotas.response_bytes:
                response_id, size = db.execute(oldest).one()
                db.execute(delete(RESPONSE).where(RESPONSE.c.id == response_id))
                count, total = count - 1, total - size

    def get(self, response_id: str, owner: str, param: str | None = None) -> StoredResponse:
        """A response of an owner. Raises `ResponseNotFound`, with the request's field `param`."""
        with self._group.read() as db:
            wanted = self._named(response_id, owner)
            row = db.execute(select(RESPONSE.c.body, RESPONSE.c.input).where(*wanted)).first()
        if row is None:
            raise ResponseNotFound(f"there is no response {response_id!r:.80}", param=param)
        return StoredResponse(*map(json.loads, row))

    def get_output(self, response_id: str, owner: str) -> list[Json]:
        """The output of a response of an owner; empty if there is no such response."""
        with self._group.read() as db:
            body = db.execute(select(RESPONSE.c.body).where(*self._named(response_id, owner))).scalar()
        output: list[Json] = json.loads(body)["output"] if body else []
        return output

    def remove(self, response_id: str, owner: str) -> None:
        """Delete a response of an owner. Raises `ResponseNotFound`."""
        with self._group.write() as db:
            deleted = db.execute(delete(RESPONSE).where(*self._named(response_id, owner))).rowcount
        if not deleted:
            raise ResponseNotFound(f"there is no response {response_id!r:.80}")

    def expire(self, now: float) -> None:
        """Delete the responses of all owners that are older than the quota's days."""
        with self._group.write() as db:
            db.execute(delete(RESPONSE).where(RESPONSE.c.created_at < self._horizon(now)))

    def _named(self, response_id: str, owner: str) -> tuple[ColumnElement[bool], ...]:
        """The conditions for a response of an owner that has not expired."""
        young = RESPONSE.c.created_at >= self._horizon(time.time())
        return RESPONSE.c.id == response_id, RESPONSE.c.owner == owner, young

    def _horizon(self, now: float) -> float:
        return now - self.quotas.response_days * 86_400


def _write(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
