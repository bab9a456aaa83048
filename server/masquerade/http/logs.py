"""How the log looks.

Knows two formats of a line. Refuses to know what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]
_TOLD = ("key", "persona", "code")  # of a request, in a line of text


class Lines(logging.Formatter):
    """One JSON object a line. What a record has in `fields` is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """For a person."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The line before its exception."""
        fields = getattr(record, "fields", {})
        more = "".join(f" {name}={fields[name]}" for name in _TOLD if fields.get(name))
        return super().formatMessage(record) + more


def configure(style: Format) -> None:
    """Log to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines() if style == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
