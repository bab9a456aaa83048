"""The table of keys, in one sqlite file of the store's folder that only its owner can read; it holds hashes only."""

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
VERSION = 2  # since 2 a hash may be HMAC's; 1 knew scrypt's only
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
        with self._session("deferred") as db:
            found = _read_version(db)
        if found > VERSION:
            raise StoreTooNew(self.path, found, VERSION)
        if found < VERSION:
            self._migrate()

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

    def rehash(self, key_id: str, old: bytes, new: bytes) -> None:
        """Keep another hash of the same secret, unless somebody has done so already."""
        with self._session() as db:
            db.execute("update key set hash = ? where id = ? and hash = ?", (new, key_id, old))

    def connect(self) -> sqlite3.Connection:
        """A connection that any thread may use, one at a time."""
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    def _migrate(self) -> None:
        """Bring the file up to date. The hashes of version 1 stay: each is replaced when its key is used."""
        with self._session() as db:
            if _read_version(db) == 0:  # another process may have been here first
                db.execute(_SCHEMA)
            db.execute(f"pragma user_version = {VERSION}")

    @contextmanager
    def _session(self, lock: str = "immediate") -> Iterator[sqlite3.Connection]:
        try:
            with closing(self.connect()) as db:
                db.execute(f"begin {lock}")
                yield db
                db.execute("commit")
        except sqlite3.Error as error:
            raise NotReady(f"the keys cannot be read: {error}") from error


def _read_version(db: sqlite3.Connection) -> int:
    version: int = db.execute("pragma user_version").fetchone()[0]
    return version


def _read(row: tuple[object, ...]) -> Key:
    key_id, name, scopes, personas, *rest = row[:-1]
    return Key(key_id, name, frozenset(json.loads(scopes)), tuple(json.loads(personas)), *rest)  # type: ignore[arg-type]
