"""One sqlite file, one transaction at a time, and whether it has changed. Knows the tables and their migrations; knows
no rule about names.

The journal is sqlite's rollback journal: one file to copy, and a crashed writer is undone by whoever opens it next.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from maskstore.errors import MaskCorrupt, StoreBusy, UnknownVersion

TIMEOUT = 30.0
MIGRATIONS = (
    """
    create table persona (name text primary key, current integer not null) strict, without rowid;
    create table generation (
        name text not null references persona on update cascade on delete cascade,
        number integer not null, digest text not null, created_at text not null,
        primary key (name, number)
    ) strict, without rowid;
    create table alias (
        alias text primary key,
        name text not null references persona on update cascade on delete cascade
    ) strict, without rowid;
    """,
    """
    alter table persona add column gamma real;
    alter table persona add column notes text not null default '';
    create table tag (
        name text not null references persona on update cascade on delete cascade,
        tag text not null,
        primary key (name, tag)
    ) strict, without rowid;
    create table pin (digest text primary key) strict, without rowid;
    """,
    """
    alter table generation add column gamma real;
    alter table generation add column phase text;
    """,
    """
    create table measurement (
        digest text primary key, certificate text not null, gamma real not null, phase text not null,
        data text not null, measured_at text not null
    ) strict, without rowid;
    """,
    """
    create table built (digest text primary key, copy text not null) strict, without rowid;
    """,
)
SCHEMA = len(MIGRATIONS)  # the newest, as the file's `user_version` counts them


class Database:
    """The registry's file; created or brought up to date when first opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.session() as db:
            version = _version(db)
        if version > SCHEMA:
            raise UnknownVersion(f"a newer version wrote this: schema {version}; up to {SCHEMA} is known", path=path)
        if version < SCHEMA:
            self._migrate()

    @contextmanager
    def session(self, lock: str = "deferred") -> Iterator[sqlite3.Connection]:
        """One transaction on a connection of its own, so that threads share nothing; an exception undoes it."""
        try:
            with closing(sqlite3.connect(self.path, timeout=TIMEOUT, isolation_level=None)) as db:
                db.execute("pragma foreign_keys = on")
                db.execute(f"begin {lock}")
                yield db
                db.execute("commit")
        except sqlite3.OperationalError as error:
            raise StoreBusy(f"the registry cannot be used: {error}", path=self.path) from None
        except sqlite3.DatabaseError as error:
            raise MaskCorrupt(f"the registry is damaged: {error}", path=self.path) from None

    def _migrate(self) -> None:
        with self.session("immediate") as db:
            for migration in MIGRATIONS[_version(db) :]:
                for statement in migration.split(";")[:-1]:
                    db.execute(statement)
            db.execute(f"pragma user_version = {SCHEMA}")

    def faults(self) -> list[str]:
        """What sqlite and the tables' own rules find wrong, in words."""
        with self.session() as db:
            broken = [row[0] for row in db.execute("pragma integrity_check") if row[0] != "ok"]
            broken += [f"{row[0]} refers to a missing {row[2]}" for row in db.execute("pragma foreign_key_check")]
            lost = db.execute(
                "select name from persona where not exists"
                " (select 1 from generation where generation.name = persona.name and number = current)"
            )
            return broken + [f"persona {name} has no current generation" for (name,) in lost]


class Watch:
    """Tells whether a file has changed, and never waits for whoever writes to it. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None  # that the connection is to: device and inode
        self._db: sqlite3.Connection | None = None

    def look(self) -> tuple[int, int, int] | None:
        """What stays equal from one look to the next if nothing was changed in between; None if that cannot be told
        now, as while somebody writes.
        """
        try:
            found = os.stat(self._path)
            if self._db is None or self._file != (found.st_dev, found.st_ino):
                self._open((found.st_dev, found.st_ino))
            assert self._db is not None
            version: int = self._db.execute("pragma data_version").fetchone()[0]
        except (OSError, sqlite3.Error):
            return None
        return found.st_dev, found.st_ino, version

    def close(self) -> None:
        """Let go of the file, until the next look."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self, file: tuple[int, int]) -> None:
        self.close()
        uri = f"{self._path.absolute().as_uri()}?mode=ro"
        self._db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
        self._file = file


def _version(db: sqlite3.Connection) -> int:
    """How many migrations the file has seen."""
    version: int = db.execute("pragma user_version").fetchone()[0]
    return version
