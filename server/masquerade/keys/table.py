"""The table of keys and the hashes of their secrets, in one SQLite file that only its owner can read."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

from maskstore.sqlite import SQLiteFile
from masquerade.errors import KeyNotFound, NotReady, StoreTooNew
from masquerade.keys.key import Key

FILE = "keys.sqlite"
BUSY_SECONDS = 5.0
_FIRST = """
create table key (
    id text primary key, name text not null, scopes text not null, personas text not null, rpm integer, tpm integer,
    created_at real not null, expires_at real, revoked_at real, hash blob not null
) strict
"""
_SECOND = ""  # since 2 a hash may be HMAC's, before it was scrypt's; a key's hash is replaced when the key is used
MIGRATIONS = (_FIRST, _SECOND)
VERSION = len(MIGRATIONS)


class KeyTable:
    """The keys of a store. Threads and processes may use it at the same time; each call is one transaction."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        os.close(os.open(self.path, os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
        self.database = SQLiteFile(
            self.path, MIGRATIONS, StoreTooNew, timeout=BUSY_SECONDS, wal=True, translate=_explain
        )

    def add(self, key: Key, stored: bytes) -> None:
        """Add a key with the hash of its secret."""
        row = vars(key) | {"scopes": json.dumps(sorted(key.scopes)), "personas": json.dumps(key.personas)}
        with self.database.write() as db:
            db.execute("insert into key values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row.values(), stored))

    def all(self) -> dict[Key, bytes]:
        """Key -> hash, also of revoked keys, the oldest first."""
        with self.database.read() as db:
            return {_read(row): row[-1] for row in db.execute("select * from key order by created_at, id")}

    def revoke(self, key_id: str) -> Key:
        """Revoke a key for good; does nothing if it is revoked. Raises `KeyNotFound`."""
        with self.database.write() as db:
            row = db.execute("select * from key where id = ?", (key_id,)).fetchone()
            if row is None:
                raise KeyNotFound(f"there is no key {key_id!r:.40}; `masquerade keys ls` lists what is there")
            key = _read(row)
            if key.revoked_at is None:
                key = replace(key, revoked_at=time.time())
                db.execute("update key set revoked_at = ? where id = ?", (key.revoked_at, key_id))
        return key

    def rehash(self, key_id: str, old: bytes, new: bytes) -> None:
        """Replace the hash of a secret by another, unless that has been done."""
        with self.database.write() as db:
            db.execute("update key set hash = ? where id = ? and hash = ?", (new, key_id, old))


def _explain(error: sqlite3.Error) -> NotReady:
    return NotReady(f"the keys cannot be read: {error}")


def _read(row: tuple[object, ...]) -> Key:
    key_id, name, scopes, personas, *rest = row[:-1]
    return Key(key_id, name, frozenset(json.loads(scopes)), tuple(json.loads(personas)), *rest)  # type: ignore[arg-type]
