"""Uploaded files on disk, each under an id that was drawn here: received whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from masquerade.errors import StateConflict, TooLarge, UploadNotFound
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
        self._claims: dict[str, int] = {}  # files that nobody has for good: how many have them tentatively
        self._claiming = threading.Lock()  # finding a twin and claiming it is one step, and so is giving it up
        folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def receive(self, owner: str, purpose: str, name: str, content: IO[bytes], *, tentative: bool = False) -> File:
        """Copy a file to disk and remember it; the same content under the same name is the file that is there.

        What was received tentatively is to be settled or given up.
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
            with self._claiming:
                twin = self._table.find_file(owner, purpose, name, digest.hexdigest())
                if twin is None:
                    os.replace(partial, self.path(file_id))
                    _sync(self._folder)
                    file = self._table.add_file(owner, purpose, name, size, digest.hexdigest(), file_id)
                    if tentative:
                        self._claims[file.id] = 1
                    return file
                if tentative and twin.id in self._claims:
                    self._claims[twin.id] += 1
                elif not tentative:
                    self._claims.pop(twin.id, None)
            partial.unlink()
            return twin
        except BaseException:
            partial.unlink(missing_ok=True)
            self.path(file_id).unlink(missing_ok=True)
            raise

    def settle(self, files: Iterable[File]) -> None:
        """What was received tentatively stays."""
        with self._claiming:
            for file in files:
                self._claims.pop(file.id, None)

    def give_up(self, files: Iterable[File]) -> None:
        """Delete what was received tentatively, unless somebody else has received it since, or a job needs it."""
        with self._claiming:
            for file in files:
                claims = self._claims.pop(file.id, 0)
                if claims > 1:
                    self._claims[file.id] = claims - 1
                elif claims:
                    with suppress(StateConflict, UploadNotFound):
                        self.remove(file.id, file.owner)

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
