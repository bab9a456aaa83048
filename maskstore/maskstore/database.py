"""The registry's SQLite file: its tables, their migrations and a check of both.

It keeps SQLite's rollback journal: there is one file to copy, and the next process to open it undoes what a crashed
writer left.
"""

import sqlite3
from pathlib import Path

from maskstore.errors import MaskCorrupt, StoreBusy, UnknownVersion
from maskstore.sqlite import SQLiteFile, Watch

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
    """
    alter table measurement rename to old_measurement;
    create table measurement (
        digest text not null, quantization text not null, certificate text not null, gamma real not null,
        phase text not null, data text not null, measured_at text not null,
        primary key (digest, quantization)
    ) strict, without rowid;
    insert into measurement select digest, '', certificate, gamma, phase, data, measured_at from old_measurement;
    drop table old_measurement;
    """,
    """
    alter table measurement rename to old_measurement;
    create table measurement (
        digest text not null, quantization text not null, certificate text not null, gamma real not null,
        phase text not null, data text not null, measured_at text not null,
        primary key (digest, quantization, gamma, phase)
    ) strict, without rowid;
    insert into measurement
    select digest, quantization, certificate, gamma, phase, data, measured_at from old_measurement;
    drop table old_measurement;
    """,
)
SCHEMA = len(MIGRATIONS)  # the newest, as the file's `user_version` counts them


class Database(SQLiteFile):
    """The registry's file; created or migrated when it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, MIGRATIONS, _too_new, timeout=TIMEOUT, translate=self._explain)

    def watch(self) -> Watch:
        """A watch for changes by any process."""
        return Watch(self.path)

    def confirm(self) -> None:
        """Raise `StoreBusy` if the lock of the current `write` may be lost; one of this machine never is."""

    def faults(self) -> list[str]:
        """What SQLite and the tables' own rules find wrong, in words."""
        with self.read() as db:
            broken = [row[0] for row in db.execute("pragma integrity_check") if row[0] != "ok"]
            broken += [f"{row[0]} refers to a missing {row[2]}" for row in db.execute("pragma foreign_key_check")]
            lost = db.execute(
                "select name from persona where not exists"
                " (select 1 from generation where generation.name = persona.name and number = current)"
            )
            return broken + [f"persona {name} has no current generation" for (name,) in lost]

    def _explain(self, error: sqlite3.Error) -> Exception:
        damaged = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR  # such as a table that is missing
        if isinstance(error, sqlite3.OperationalError) and not damaged:
            return StoreBusy(f"the registry cannot be used: {error}", path=self.path)
        return MaskCorrupt(f"the registry is damaged: {error}", path=self.path)


def _too_new(path: Path, version: int, known: int) -> Exception:
    return UnknownVersion(f"a newer version wrote this: schema {version}; up to {known} is known", path=path)
