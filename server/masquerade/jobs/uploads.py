"""Uploaded files on disk.

Knows how bytes from outside get into a file whole, or not at all. Refuses to use a client's name as a path: a file lies
under an id that was drawn here.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import IO

from masquerade.errors import TooLarge
from masquerade.jobs.records import RESULTS, File
from masquerade.jobs.table import JobTable

PIECE = 2**20  # bytes copied at a time
_PARTIAL = ".partial"


class Uploads:
    """A folder of files, and what the table says about them."""

    def __init__(self, folder: Path, table: JobTable, limit: int) -> None:
        self._folder = folder
        self._table = table
        self.limit = limit  # bytes a file
        folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def receive(self, owner: str, purpose: str, name: str, content: IO[bytes]) -> File:
        """Copy a file to disk and remember it; the same content under the same name is the file that is there.

        Raises `TooLarge` and `QuotaExceeded`, and then keeps nothing.
        """
        file_id = _draw_id()
        partial = self._folder / f"{file_id}{_PARTIAL}"
        digest, size = hashlib.sha256(), 0
        try:
            with partial.open("xb") as out:
                while piece := content.read(PIECE):
                    size += len(piece)
                    if size > self.limit:
                        raise TooLarge(f"the file is larger than {self.limit} bytes, which is the limit", param="file")
                    digest.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            twin = self._table.find_file(owner, purpose, name, digest.hexdigest())
            if twin is not None:
                partial.unlink()
                return twin
            os.replace(partial, self.path(file_id))
            _sync(self._folder)
            return self._table.add_file(owner, purpose, name, size, digest.hexdigest(), file_id)
        except BaseException:
            partial.unlink(missing_ok=True)
            self.path(file_id).unlink(missing_ok=True)
            raise

    def adopt(self, owner: str, name: str, path: Path, digest: str) -> File:
        """Give an owner what was made, which lies on this disk already: it takes no more room."""
        twin = self._table.find_file(owner, RESULTS, name, digest)
        if twin is not None:
            return twin
        file_id = _draw_id()
        os.link(path, self.path(file_id))
        try:
            _sync(self._folder)
            return self._table.add_file(owner, RESULTS, name, path.stat().st_size, digest, file_id)
        except BaseException:
            self.path(file_id).unlink()
            raise

    def path(self, file_id: str) -> Path:
        """Where a file's content lies."""
        return self._folder / file_id

    def remove(self, file_id: str, owner: str) -> None:
        """Forget a file and delete its content, in this order: a crash between leaves bytes, which `_sweep` finds."""
        self._table.remove_file(file_id, owner)
        self.path(file_id).unlink(missing_ok=True)

    def expire(self, now: float) -> None:
        """Forget what is older than the quotas keep it, and delete the content."""
        for file_id in self._table.expire(now)[1]:
            self.path(file_id).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what a server that died left behind: half-received files, and content that nothing remembers."""
        known = self._table.known_files()
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()


def _draw_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
