"""The table of keys, in one sqlite file of the store's folder that only its owner can read.

Knows transactions. Refuses to know secrets: it is given hashes, and never hands one out but to the keyring.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from masquerade.errors import KeyNotFound, NotReady, StoreTooNew
from masquerade.keys.key import Key

FILE = "keys.sqlite"
VERSION = 1
BUSY_SECONDS = 5.0
_SCHEMA = """
create table key (
    id text primary key, name text not null, scopes text not null, personas text not null, rpm integer, tpm integer,
    created_at real not null, expires_at real, revoked_at real, hash blob not null
) strict
"""


class KeyTable:
    """One sqlite file in WAL mode. Threads and processes may use it at once; each call is a connection of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        os.close(os.open(self.path, os.O_CREAT, 0o600))  # sqlite gives its other files the same mode
        with closing(self.connect()) as db:
            db.execute("pragma journal_mode = wal")
        with self._session() as db:
            found = db.execute("pragma user_version").fetchone()[0]
            if found > VERSION:
                raise StoreTooNew(self.path, found, VERSION)
            if found < VERSION:
                db.execute(_SCHEMA)
                db.execute(f"pragma user_version = {VERSION}")

    def add(self, key: Key, kept: bytes) -> None:
        """Remember a key by the hash of its secret."""
        row = vars(key) | {"scopes": json.dumps(sorted(key.scopes)), "personas": json.dumps(key.personas)}
        with self._session() as db:
            db.execute("insert into key values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row.values(), kept))

    def all(self) -> dict[Key, bytes]:
        """Every key there ever was, the oldest first, with its hash."""
        with self._session("deferred") as db:
            return {_read(row): row[-1] for row in db.execute("select * from key order by created_at, id")}

    def revoke(self, key_id: str) -> Key:
        """End a key for good; again changes nothing. Raises `KeyNotFound`."""
        with self._session() as db:
            row = db.execute("select * from key where id = ?", (key_id,)).fetchone()
            if row is None:
                raise KeyNotFound(f"there is no key {key_id!r:.40}; `masquerade keys ls` lists what is there")
            key = _read(row)
            if key.revoked_at is None:
                key = replace(key, revoked_at=time.time())
                db.execute("update key set revoked_at = ? where id = ?", (key.revoked_at, key_id))
        return key

    def connect(self) -> sqlite3.Connection:
        """A connection that any thread may use, one at a time."""
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    @contextmanager
    def _session(self, lock: str = "immediate") -> Iterator[sqlite3.Connection]:
        try:
            with closing(self.connect()) as db:
                db.execute(f"begin {lock}")
                yield db
                db.execute("commit")
        except sqlite3.Error as error:
            raise NotReady(f"the keys cannot be read: {error}") from error


def _read(row: tuple[object, ...]) -> Key:
    key_id, name, scopes, personas, *rest = row[:-1]
    return Key(key_id, name, frozenset(json.loads(scopes)), tuple(json.loads(personas)), *rest)  # type: ignore[arg-type]
