"""What the tables of a group share: transactions, a clock, and a watch for changes."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Connection, Table


class TableWatch(Protocol):
    """Detects changes of a table. For one thread at a time."""

    def look(self) -> Hashable:
        """A value that stays equal while nothing changes. Raises what the transactions of the group raise."""

    def close(self) -> None:
        """Give up the connection, if it has one."""


class TableGroup(Protocol):
    """Tables that one lock guards. Threads and processes may use them at the same time."""

    @property
    def shared(self) -> bool:
        """Whether several servers may work on what the tables hold."""

    def read(self) -> AbstractContextManager[Connection]:
        """A consistent view, in which statements that write fail."""

    def write(self) -> AbstractContextManager[Connection]:
        """A transaction that holds the group's one write lock; an exception rolls it back."""

    def now(self, db: Connection) -> float:
        """Unix seconds of the clock that all servers go by."""

    def watch(self, table: Table) -> TableWatch:
        """A watch for changes of a table by other connections."""

    def close(self) -> None:
        """Close what is kept open. Has no effect when repeated."""
