"""The results of a batch while it runs: lines that are on disk before the next request takes their place."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

_CHUNK = 2**20


class BatchResults:
    """Two JSONL files, of responses and of errors; a line that is in one of them is never answered again.

    Opening them reads what an earlier server wrote, and removes a line that it did not complete. Threads may append at
    the same time. Raises `OSError`.
    """

    def __init__(self, folder: Path, batch_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output, self.errors = (folder / f"{batch_id}.{kind}.jsonl" for kind in ("output", "errors"))
        self._lock = threading.Lock()
        self._closed = False
        completed, failed = _recover(self.output), _recover(self.errors)
        self.done = completed | failed  # custom ids
        self.completed, self.failed = len(completed), len(failed)

    def append(self, custom_id: str, line: str, *, failed: bool) -> None:
        """Add the line of a request; without effect after `close`, or if the request has one."""
        with self._lock:
            if self._closed or custom_id in self.done:
                return
            content = f"{line}\n".encode()
            with (self.errors if failed else self.output).open("ab", buffering=0) as file:
                start = file.tell()
                try:
                    while content:
                        content = content[file.write(content) :]
                except OSError:  # a full disk: the next line must not continue this one
                    file.truncate(start)
                    raise
            self.done.add(custom_id)
            self.completed, self.failed = self.completed + (not failed), self.failed + failed

    def close(self) -> None:
        """Append nothing from now on."""
        with self._lock:
            self._closed = True

    def discard(self) -> None:
        """Delete the files."""
        self.close()
        for path in (self.output, self.errors):
            path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """The SHA-256 of a file, after all of it is on the disk."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _recover(path: Path) -> set[str]:
    """The custom ids of the complete lines of a file, which is cut after the last of them."""
    ids: set[str] = set()
    if not path.exists():
        return ids
    end = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                ids.add(json.loads(line)["custom_id"])
            except ValueError:  # a crash of the machine may leave zeros
                break
            end += len(line)
        file.truncate(end)
    return ids
