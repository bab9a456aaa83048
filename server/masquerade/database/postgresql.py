"""Tables in a PostgreSQL database, which the servers of a store share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    Table,
    create_engine,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from masquerade.database.tables import METADATA, PlainText
from masquerade.database.url import DatabaseURL
from masquerade.errors import DatabaseUnreachable, InvalidValue, MasqueradeError, NotReady, StorageFull, StoreTooNew

_log = logging.getLogger(__name__)
VERSION = 1  # of the tables
CONNECT_SECONDS = 5
# The server ends what a client that hangs or has lost its network would hold: the group's lock above all.
_OPTIONS = "-c lock_timeout=20s -c statement_timeout=60s -c idle_in_transaction_session_timeout=20s"
_DEFAULTS: dict[str, Any] = {
    "application_name": "masquerade",
    "connect_timeout": CONNECT_SECONDS,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}
_CONNECTIONS, _MORE = 4, 12  # kept open by a server; and more of them under load
_LOCKS = {"schema": 0, "keys": 1, "jobs": 2, "responses": 3}  # each group's lock, below a number of Masquerade's own
_LOCK = 0x6D61_7371_0000
_FULL, _READ_ONLY, _IDLE = "53100", "25006", "25P03"  # SQLSTATE; the last one ends transactions that hang

Group = Literal["keys", "jobs", "responses"]
_STATE = Table("masquerade", METADATA, Column("version", Integer, nullable=False), Column("store", PlainText))


class PostgreSQL:
    """A database, whose tables are created when it is opened first, if `create`. Threads may use it at the same time.

    Raises `DatabaseUnreachable`, `StoreTooNew`, and `InvalidValue` without the extra `postgresql`. No message and no
    line of the log has the password.
    """

    def __init__(self, url: DatabaseURL, *, create: bool = True) -> None:
        if find_spec("psycopg") is None:
            raise InvalidValue("--database needs pip install 'masquerade[postgresql]'")
        self.url = url
        address = url.reveal()
        own = {name: value for name, value in _DEFAULTS.items() if name not in address.query}
        own["options"] = " ".join((_OPTIONS, *address.normalized_query.get("options", ())))

        def pool(size: int, more: int) -> Engine:
            return create_engine(
                address.difference_update_query(["options"]),
                connect_args=own,
                pool_pre_ping=True,
                pool_size=size,
                max_overflow=more,
                pool_timeout=CONNECT_SECONDS,
                hide_parameters=True,
            )

        self._engine = pool(_CONNECTIONS, _MORE)
        self._reader = pool(1, 0)  # for keys, also while writers that wait for a lock hold all other connections
        self._lost = False  # whether the last transaction found no database
        try:
            with self.begin() as db:
                if create:
                    _create(db)
                _check_version(db, url)
        except DBAPIError as error:
            raise self._explain_start(error.orig) from None
        except NotReady as error:
            raise self._explain_start(error.__cause__) from None

    def group(self, name: Group, *, durable: bool = True) -> PostgreSQLGroup:
        """The tables of a group. Unless `durable`, a crash of the database may undo the last transactions."""
        reader = self._reader if name == "keys" else None
        return PostgreSQLGroup(self, _LOCK + _LOCKS[name], durable, reader)

    def bind_store(self, store: str, prepare: Callable[[str], object]) -> tuple[str, bool]:
        """The id of the store whose servers use this database, and whether it is new: then it is `store`.

        For a new one, `prepare` is called before another server can find it.
        """
        with self.group("jobs").write() as db:
            known: str | None = db.execute(select(_STATE.c.store)).scalar_one()
            if known is None:
                prepare(store)
                db.execute(update(_STATE).values(store=store))
            return known or store, known is None

    @contextmanager
    def begin(self, engine: Engine | None = None, **options: Any) -> Iterator[Connection]:
        """A transaction with SQLAlchemy's execution options. Raises `NotReady` if the database is not there."""
        try:
            with (engine or self._engine).connect() as db, db.execution_options(**options).begin():
                yield db
        except PoolTimeout as error:
            raise NotReady("all connections to the database are in use; try again") from error
        except DBAPIError as error:
            raise self._translate(error) from error.orig
        if self._lost:
            self._lost = False
            _log.warning("the database %s answers again", self.url)

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._engine.dispose()
        self._reader.dispose()

    def _translate(self, error: DBAPIError) -> Exception:
        import psycopg

        state = getattr(error.orig, "sqlstate", None)
        if state == _FULL:
            return StorageFull("the server has no room for this in its database")
        gone = isinstance(error.orig, psycopg.OperationalError | psycopg.InterfaceError)
        if not gone and state not in (_READ_ONLY, _IDLE):
            return error
        if not self._lost:
            self._lost = True
            _log.error("the database %s does not answer: %s", self.url, self.url.redact(str(error.orig)))
        return NotReady("the server's database does not answer; try again")

    def _explain_start(self, error: BaseException | None) -> MasqueradeError:
        return DatabaseUnreachable(f"the database {self.url} cannot be used: {self.url.redact(str(error))}")


class PostgreSQLGroup:
    """Tables that an advisory lock guards, as SQLite's write lock does a file."""

    shared = True

    def __init__(self, database: PostgreSQL, lock: int, durable: bool, reader: Engine | None) -> None:
        self.database = database
        self._reader = reader  # of reads that have a connection of their own
        self._lock = lock
        self._commit = "on" if durable else "off"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view, in which statements that write fail."""
        with self.database.begin(self._reader, isolation_level="REPEATABLE READ", postgresql_readonly=True) as db:
            yield db

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the group's one write lock; an exception rolls it back."""
        with self.database.begin() as db:
            commit = func.set_config("synchronous_commit", self._commit, True)
            db.execute(select(commit, func.pg_advisory_xact_lock(self._lock)))
            yield db

    def now(self, db: Connection) -> float:
        """Unix seconds of the database's clock."""
        seconds: float = db.execute(text("select extract(epoch from clock_timestamp())::float8")).scalar_one()
        return seconds

    def watch(self, table: Table) -> PostgreSQLWatch:
        """A watch for changes of a table."""
        return PostgreSQLWatch(self, table)

    def close(self) -> None:
        """Nothing: the database closes its connections."""


class PostgreSQLWatch:
    """Detects changes of a table."""

    def __init__(self, group: PostgreSQLGroup, table: Table) -> None:
        self._group = group
        written = func.sum(text("xmin::text::bigint").self_group())
        self._query = select(func.count(), func.coalesce(written, 0)).select_from(table)

    def look(self) -> Hashable:
        """The number of rows and the sum of their transactions' numbers: with the same rows, a change increases it."""
        with self._group.read() as db:
            return tuple(db.execute(self._query).one())

    def close(self) -> None:
        """Nothing: it keeps no connection."""


def _create(db: Connection) -> None:
    """Create the tables, unless they are there."""
    db.execute(select(func.pg_advisory_xact_lock(_LOCK + _LOCKS["schema"])))
    if not inspect(db).has_table(_STATE.name):
        METADATA.create_all(db)
        db.execute(insert(_STATE).values(version=VERSION))


def _check_version(db: Connection, url: DatabaseURL) -> None:
    if not inspect(db).has_table(_STATE.name):
        raise DatabaseUnreachable(f"the database {url} has no tables yet; `masquerade serve` creates them")
    version: int = db.execute(select(_STATE.c.version)).scalar_one()
    if version > VERSION:
        raise StoreTooNew(url, version, VERSION)
