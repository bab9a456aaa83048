"""Where keys, files, jobs, batches and responses are stored: SQLite files, or a PostgreSQL database."""

from masquerade.database.group import TableGroup, TableWatch
from masquerade.database.postgresql import PostgreSQL
from masquerade.database.sqlite import SQLiteGroup
from masquerade.database.url import DatabaseURL

__all__ = ["DatabaseURL", "PostgreSQL", "SQLiteGroup", "TableGroup", "TableWatch"]
