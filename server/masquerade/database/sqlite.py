"""Tables in a SQLite file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, NullPool, Table, create_engine
from sqlalchemy.exc import DBAPIError

from maskstore.sqlite import SQLiteFile
from masquerade.errors import StoreTooNew


class SQLiteGroup:
    """The tables of one file, with a write-ahead log; created or migrated when it is opened.

    `translate` returns what is raised for an error of SQLite; without it the error itself is. `timeout` is in seconds,
    for locks. Unless `durable`, no transaction waits for the disk: a power failure may undo the last ones.
    """

    shared = False

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        *,
        timeout: float,
        durable: bool = True,
        translate: Callable[[sqlite3.Error], Exception] | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = SQLiteFile(
            path, migrations, StoreTooNew, timeout=timeout, wal=True, durable=durable, translate=translate
        )
        self.path = path
        self._translate = translate
        self._engine = create_engine("sqlite://", creator=lambda: self.file.connect(), poolclass=NullPool)
        # While a connection is open, closing another one does not copy the log into the file, for which it would wait.
        self._kept = None if durable else self.file.connect()
        if self._kept is not None:
            self._kept.execute("select 1 from sqlite_master limit 1").fetchone()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view, in which statements that write fail."""
        with self._begin("deferred") as db:
            db.exec_driver_sql("pragma query_only = on")
            yield db

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the file's one write lock; an exception rolls it back."""
        with self._begin("immediate") as db:
            yield db

    def now(self, _: Connection) -> float:
        """Unix seconds of this machine, which all users of a file share."""
        return time.time()

    def watch(self, _: Table) -> FileWatch:
        """A watch for changes of the file."""
        return FileWatch(self.file.connect(), self._translate)

    def close(self) -> None:
        """Copy the log into the file, if no other process uses it. Has no effect when repeated."""
        if self._kept is not None:
            self._kept.close()

    @contextmanager
    def _begin(self, lock: str) -> Iterator[Connection]:
        try:
            with self._engine.connect() as db:  # closing rolls back what is not committed
                db.exec_driver_sql("pragma foreign_keys = on")
                db.exec_driver_sql(f"begin {lock}")
                yield db
                db.commit()
        except DBAPIError as error:
            if not isinstance(error.orig, sqlite3.Error):
                raise
            raise (self._translate(error.orig) if self._translate else error.orig) from error


class FileWatch:
    """Detects changes of a file by other connections. For one thread at a time."""

    def __init__(self, db: sqlite3.Connection, translate: Callable[[sqlite3.Error], Exception] | None) -> None:
        self._db = db
        self._translate = translate

    def look(self) -> Hashable:
        """SQLite's counter of changes."""
        try:
            version: int = self._db.execute("pragma data_version").fetchone()[0]
        except sqlite3.Error as error:
            raise (self._translate(error) if self._translate else error) from error
        return version

    def close(self) -> None:
        """Close the connection."""
        self._db.close()
