"""The table of keys and the hashes of their secrets."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Row, insert, select, update

from masquerade.database.group import TableGroup
from masquerade.database.migrations import KEYS
from masquerade.database.postgresql import PostgreSQL
from masquerade.database.sqlite import SQLiteGroup
from masquerade.database.tables import KEY
from masquerade.errors import KeyNotFound, NotReady
from masquerade.keys.key import Key

FILE = "keys.sqlite"
BUSY_SECONDS = 5.0


class KeyTable:
    """The keys of a store: in a SQLite file there that only its owner can read, or in a database.

    Threads and processes may use it at the same time; each call is one transaction.
    """

    def __init__(self, folder: Path, database: PostgreSQL | None = None) -> None:
        self.group: TableGroup = database.group("keys") if database else _open_file(folder / FILE)

    def add(self, key: Key, stored: bytes) -> bool:
        """Add a key with the hash of its secret; False, and no change, if there is a key with its id."""
        row = vars(key) | {"scopes": json.dumps(sorted(key.scopes)), "personas": json.dumps(key.personas)}
        with self.group.write() as db:
            if db.execute(select(KEY.c.id).where(KEY.c.id == key.id)).first():
                return False
            db.execute(insert(KEY).values(**row, hash=stored))
        return True

    def all(self) -> dict[Key, bytes]:
        """Key -> hash, also of revoked keys, the oldest first."""
        with self.group.read() as db:
            return {_read(row): row.hash for row in db.execute(select(KEY).order_by(KEY.c.created_at, KEY.c.id))}

    def revoke(self, key_id: str) -> Key:
        """Revoke a key for good; does nothing if it is revoked. Raises `KeyNotFound`."""
        with self.group.write() as db:
            row = db.execute(select(KEY).where(KEY.c.id == key_id)).first()
            if row is None:
                raise KeyNotFound(f"there is no key {key_id!r:.40}; `masquerade keys ls` lists what is there")
            key = _read(row)
            if key.revoked_at is None:
                key = replace(key, revoked_at=time.time())
                db.execute(update(KEY).where(KEY.c.id == key_id).values(revoked_at=key.revoked_at))
        return key

    def rehash(self, key_id: str, old: bytes, new: bytes) -> None:
        """Replace the hash of a secret by another, unless that has been done."""
        with self.group.write() as db:
            db.execute(update(KEY).where(KEY.c.id == key_id, KEY.c.hash == old).values(hash=new))


def _open_file(path: Path) -> SQLiteGroup:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
    return SQLiteGroup(path, KEYS, timeout=BUSY_SECONDS, translate=_explain)


def _explain(error: sqlite3.Error) -> NotReady:
    return NotReady(f"the keys cannot be read: {error}")


def _read(row: Row[Any]) -> Key:
    fields = {name: getattr(row, name) for name in Key.__dataclass_fields__}
    return Key(**fields | {"scopes": frozenset(json.loads(row.scopes)), "personas": tuple(json.loads(row.personas))})
