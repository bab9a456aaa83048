"""The address of a PostgreSQL database, whose password is never shown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from masquerade.errors import InvalidValue

if TYPE_CHECKING:
    from sqlalchemy import URL

_SCHEMES = ("postgresql", "postgres")
_CREDENTIALS = re.compile(r"//\S*@|\bpassword=[^&\s]*", re.IGNORECASE)


class DatabaseURL:
    """`postgresql://user:password@host:port/name`, with libpq's parameters as a query. Its text has no password."""

    def __init__(self, text: str) -> None:
        """Raises `InvalidValue`, whose message repeats nothing of the text but a wrong scheme."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in _SCHEMES:
            given = f"the scheme {scheme!r:.20}" if separator else "no scheme"
            raise InvalidValue(f"--database needs postgresql://USER:PASSWORD@HOST:PORT/NAME; what is given has {given}")

        # It takes a third of a second to import, and most commands have no database
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            self._url = make_url(f"postgresql+psycopg://{rest}")
            if "@" in (self._url.host or ""):  # the end of a password
                raise ValueError
        except (ArgumentError, ValueError):
            raise InvalidValue(
                "--database cannot be read as postgresql://USER:PASSWORD@HOST:PORT/NAME; write special characters of "
                "the password as %XX"
            ) from None

    def __str__(self) -> str:
        found = self._url
        host = found.host or _last(found, "host") or "localhost"
        port = found.port or _last(found, "port") or 5432
        user = f"{found.username}@" if found.username else ""
        return f"postgresql://{user}{host}:{port}/{found.database or found.username or ''}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatabaseURL) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def reveal(self) -> URL:
        """The address with its password, for SQLAlchemy."""
        return self._url

    def redact(self, text: str) -> str:
        """A text of the driver without the password, on one line."""
        for password in filter(None, (self._url.password, _last(self._url, "password"))):
            text = text.replace(password, "***")
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def hide_credentials(text: str) -> str:
    """A text, such as a value of the configuration, without what looks like the user and password of a URL."""
    return _CREDENTIALS.sub("***", text)


def _last(url: URL, name: str) -> str | None:
    value = url.query.get(name)
    return value[-1] if isinstance(value, tuple) else value
