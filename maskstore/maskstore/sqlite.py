"""SQLite files: connections, migrations, transactions, read-only sessions and a watch for changes."""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path


class SQLiteFile:
    """One SQLite file, created or migrated when it is opened. Threads and processes may use it at the same time.

    Each session is one transaction on a connection of its own. The file's `user_version` is the number of migrations it
    has had; of a file that has had more than are known, `too_new(path, version, known)` is raised. `translate` returns
    what is raised for an error of SQLite; without it the error itself is. `timeout` is in seconds, for locks.
    Unless `durable`, with `wal`, no transaction waits for the disk: a power failure may undo the last ones.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        too_new: Callable[[Path, int, int], Exception],
        *,
        timeout: float,
        wal: bool = False,
        durable: bool = True,
        translate: Callable[[sqlite3.Error], Exception] | None = None,
    ) -> None:
        self.path = path
        self.timeout = timeout
        self._durable = durable
        self._translate = translate
        if wal:
            with closing(self.connect()) as db:
                db.execute("pragma journal_mode = wal")
        with self.read() as db:
            version = _version(db)
        self.is_new = version == 0
        if version > len(migrations):
            raise too_new(path, version, len(migrations))
        if version < len(migrations):
            self._migrate(migrations)

    def connect(self, path: Path | None = None) -> sqlite3.Connection:
        """A connection, to this file or to a copy, that any thread may use, one at a time."""
        db = sqlite3.connect(path or self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        if not self._durable:
            db.execute("pragma synchronous = normal")
        return db

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A consistent view, in which statements that write fail."""
        with self._session("deferred") as db:
            db.execute("pragma query_only = on")
            yield db

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the file's one write lock; an exception rolls it back."""
        with self._session("immediate") as db:
            yield db

    @contextmanager
    def _session(self, lock: str, path: Path | None = None) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self.connect(path)) as db:  # closing rolls back what is not committed
                db.execute("pragma foreign_keys = on")
                db.execute(f"begin {lock}")
                yield db
                db.execute("commit")
        except sqlite3.Error as error:
            if self._translate is None:
                raise
            raise self._translate(error) from error

    def _migrate(self, migrations: Sequence[str]) -> None:
        with self.write() as db:
            for migration in migrations[_version(db) :]:  # another process may have been here first
                for statement in filter(str.strip, migration.split(";")):
                    db.execute(statement)
            db.execute(f"pragma user_version = {len(migrations)}")


class Watch:
    """Detects changes of a file without waiting for its lock. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None  # device and inode that the connection is to
        self._db: sqlite3.Connection | None = None

    def look(self) -> tuple[int, int, int] | None:
        """A value that stays equal while nothing changes; None if that is unknown now, as during a write."""
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
        """Close the connection, until the next look."""
        self._disconnect()

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self, file: tuple[int, int]) -> None:
        self._disconnect()
        self._db = open_readonly(self._path, timeout=0)
        self._file = file


def open_readonly(path: Path, timeout: float = 5.0) -> sqlite3.Connection:
    """A connection that neither creates nor changes the file. Any thread may use it, one at a time."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def read_version(path: Path) -> int:
    """How many migrations a file has had, read without changing it. Raises `sqlite3.Error`."""
    with closing(open_readonly(path)) as db:
        return _version(db)


def _version(db: sqlite3.Connection) -> int:
    """How many migrations the file has had."""
    version: int = db.execute("pragma user_version").fetchone()[0]
    return version
