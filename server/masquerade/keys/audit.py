"""The audit log of a store: one JSON object a line, in `audit.jsonl`; ids and names, without content or secrets."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

FILE = "audit.jsonl"
_log = logging.getLogger(__name__)


class Audit:
    """Appends to the log; several processes may. The file is opened for each line, so it may be renamed at any time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def write(self, *, key: str | None, action: str, target: str, outcome: str, request_id: str | None = None) -> None:
        """Append a line and sync it to disk. An error, such as a full disk, is logged and not raised."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "key": key,
            "action": action,
            "target": target,
            "outcome": outcome,
        }
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(handle, "wb", buffering=0) as file:  # one write a line, so that lines of processes do not mix
                file.write(json.dumps(entry).encode() + b"\n")
                os.fsync(handle)
        except OSError as error:
            _log.error("the audit log cannot be written (%s): %s", error.strerror, json.dumps(entry))
