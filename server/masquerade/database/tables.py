"""The columns of all tables, for both databases.

PostgreSQL's tables are made from these definitions. Those of SQLite come from migrations; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

METADATA = MetaData()


class PlainText(TypeDecorator[str]):
    """Text. PostgreSQL cannot store NUL: there it becomes U+FFFD, in values to store and to look for."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text that the driver gets."""
        return value.replace("\0", "\ufffd") if value and dialect.name == "postgresql" else value


def _text(name: str, *, null: bool = False, default: str | None = None) -> Column[str]:
    return Column(name, PlainText, nullable=null, server_default=default)


def _time(name: str, *, null: bool = False) -> Column[float]:
    """Unix seconds."""
    return Column(name, Double, nullable=null)


def _count(name: str, *, default: str | None = None) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=default)


def _order() -> Column[int]:
    """The order in which rows were added, by the name that SQLite has for it in every table."""
    return Column("rowid", BigInteger, Identity(), nullable=False)


def _id() -> Column[str]:
    return Column("id", PlainText, primary_key=True)


KEY = Table(
    "key",
    METADATA,
    _id(),
    _text("name"),
    _text("scopes"),  # JSON, as `personas`
    _text("personas"),
    Column("rpm", BigInteger),
    Column("tpm", BigInteger),
    _time("created_at"),
    _time("expires_at", null=True),
    _time("revoked_at", null=True),
    Column("hash", LargeBinary, nullable=False),
)
FILE = Table(
    "file",
    METADATA,
    _id(),
    _text("owner"),
    _text("purpose"),
    _text("name"),
    _count("bytes"),
    _text("digest"),
    _time("created_at"),
    _count("claims", default="0"),  # tentative uploads of a file that is not confirmed; 0 for all others
    _order(),
)
JOB = Table(
    "job",
    METADATA,
    _id(),
    _text("owner"),
    _text("state"),
    _text("spec"),  # JSON, as `error` and `result`
    _time("created_at"),
    _time("started_at", null=True),
    _time("finished_at", null=True),
    _text("error", null=True),
    _text("result", null=True),
    _text("key", null=True),
    _count("cancelling", default="0"),
    _text("worker", null=True),  # the server that runs it
    _time("lease_until", null=True),  # the end of the server's lease, unless the server renews it
    _order(),
)
EVENT = Table(
    "event",
    METADATA,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
    Column("job", PlainText, ForeignKey(JOB.c.id, ondelete="cascade"), nullable=False),
    _time("created_at"),
    _text("level"),
    _text("message"),
    _text("data"),  # JSON
    Index("event_of_job", "job", "number"),
)
RESPONSE = Table(
    "response",
    METADATA,
    _id(),
    _text("owner"),
    _count("bytes"),
    _time("created_at"),
    _text("body"),  # JSON, as `input`
    _text("input"),
    Index("response_of_owner", "owner", "created_at", "bytes"),
    Index("response_by_age", "created_at"),
)
BATCH = Table(
    "batch",
    METADATA,
    _id(),
    _text("owner"),
    _text("state"),
    _text("endpoint"),
    _text("input_file"),
    _text("metadata"),  # JSON, as `times` and `errors`
    _time("created_at"),
    _text("times", default="{}"),
    _count("total", default="0"),
    _count("completed", default="0"),
    _count("failed", default="0"),
    _text("output_file", null=True),
    _text("error_file", null=True),
    _text("errors", default="[]"),
    _text("key", null=True),
    _text("worker", null=True),
    _time("lease_until", null=True),
    _order(),
)
