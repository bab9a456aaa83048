"""Uploaded files on disk, each under a random id; an incomplete upload leaves nothing."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from maskstore.files import sync_folder
from masquerade.errors import NotReady, TooLarge
from masquerade.jobs.records import RESULTS, File
from masquerade.jobs.table import JobTable

CHUNK = 2**20  # bytes copied at a time
SHARED_SECONDS = 6 * 3600.0  # for which incomplete uploads are kept where servers share the folder
_PARTIAL = ".partial"


class Uploads:
    """A folder of files and their rows in the table."""

    def __init__(self, folder: Path, table: JobTable, limit: int) -> None:
        self._folder = folder
        self._table = table
        self.limit = limit  # bytes a file
        self._claiming = threading.Lock()  # makes finding a duplicate and adding a file one step, on this server
        folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def receive(self, owner: str, purpose: str, name: str, content: IO[bytes], *, tentative: bool = False) -> File:
        """Copy a file to disk and add it to the table; return an existing file of the same name and content.

        A tentative file must be confirmed or discarded. Raises `TooLarge` and `QuotaExceeded`, and then keeps nothing.
        """
        file_id = _draw_id()
        partial = self._folder / f"{file_id}{_PARTIAL}"
        digest, size = hashlib.sha256(), 0
        try:
            with partial.open("xb") as out:
                while chunk := content.read(CHUNK):
                    size += len(chunk)
                    if size > self.limit:
                        raise TooLarge(f"the file is larger than {self.limit} bytes, which is the limit", param="file")
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            with self._claiming:
                same = self._table.claim_file(owner, purpose, name, digest.hexdigest(), tentative=tentative)
                if same is None:
                    os.replace(partial, self.path(file_id))
                    sync_folder(self._folder)
                    return self._table.add_file(
                        owner, purpose, name, size, digest.hexdigest(), file_id, tentative=tentative
                    )
            partial.unlink()
            return same
        except NotReady:  # the database is lost, and may have stored the row: the content stays until the next sweep
            partial.unlink(missing_ok=True)
            raise
        except BaseException:
            partial.unlink(missing_ok=True)
            self.path(file_id).unlink(missing_ok=True)
            raise

    def confirm(self, files: Iterable[File]) -> None:
        """Keep tentative files."""
        for file in files:
            self._table.confirm_file(file.id)

    def discard(self, files: Iterable[File]) -> None:
        """Delete tentative files, except those that another upload has claimed or a job needs."""
        for file in files:
            with self._claiming:
                if self._table.discard_file(file.id):
                    self.path(file.id).unlink(missing_ok=True)

    def adopt(self, owner: str, name: str, path: Path, digest: str, purpose: str = RESULTS) -> File:
        """Add the result of a job or batch by a hard link: the file is on this disk already."""
        same = self._table.find_file(owner, purpose, name, digest)
        if same is not None:
            return same
        file_id = _draw_id()
        os.link(path, self.path(file_id))
        try:
            sync_folder(self._folder)
            return self._table.add_file(owner, purpose, name, path.stat().st_size, digest, file_id)
        except NotReady:  # as above
            raise
        except BaseException:
            self.path(file_id).unlink()
            raise

    def path(self, file_id: str) -> Path:
        """The path of a file's content."""
        return self._folder / file_id

    def remove(self, file_id: str, owner: str) -> None:
        """Delete a file's row and then its content: after a crash between the two, `_sweep` deletes the content."""
        self._table.remove_file(file_id, owner)
        self.path(file_id).unlink(missing_ok=True)

    def expire(self, now: float) -> None:
        """Delete expired jobs and files."""
        for file_id in self._table.expire(now)[1]:
            self.path(file_id).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what a server that died left: incomplete uploads, and content without a row.

        Where servers share the folder, what changed in the last hours may be an upload of another one, and stays.
        """
        known, now = self._table.known_files(), time.time()
        for path in self._folder.iterdir():
            if path.name not in known:
                with suppress(FileNotFoundError):  # another server sweeps too
                    if not self._table.group.shared or now - path.stat().st_ctime > SHARED_SECONDS:
                        path.unlink()


def _draw_id() -> str:
    return f"file-{secrets.token_hex(12)}"
