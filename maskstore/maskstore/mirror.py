"""A store and a registry whose truth is in a bucket; the folder is this machine's copy."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection
from typing import Self
from urllib.parse import quote, unquote

from maskstore import files
from maskstore.bucket import SCHEME, S3Bucket, VersionConflict, make_token
from maskstore.database import TIMEOUT, Database
from maskstore.errors import BucketUnreachable, DigestMismatch, MaskCorrupt, MaskNotFound, StoreBusy
from maskstore.format import read_mask
from maskstore.signing import Signable
from maskstore.sqlite import Watch
from maskstore.store import SUFFIX, Store

_log = logging.getLogger(__name__)
LEASE = 10.0  # seconds after which the lock of a machine that says nothing is taken over
POLL = 0.5  # seconds between two looks at the bucket's registry
RETRY = 0.1  # seconds between two attempts to lock
_LOCK = "registry.lock"


def name_folder(url: str) -> str:
    """The name of the folder that is a machine's copy of a bucket."""
    return quote(url.rstrip("/"), safe="")


def find_url(root: Path) -> str | None:
    """The URL of the bucket that a folder is a copy of, by the folder's name; None for any other folder."""
    url = unquote(root.name)
    return url if url.startswith(SCHEME) and name_folder(url) == root.name else None


def find_bucket(root: Path) -> S3Bucket | None:
    """The bucket that a folder is a copy of; None for any other folder."""
    url = find_url(root)
    return None if url is None else S3Bucket(url)


def open_store(
    root: Path, bucket: S3Bucket | None, require_signed: bool = False, accept_tensors: bool = False
) -> Store:
    """The store in a folder, or that of the bucket which the folder is a copy of."""
    if bucket is None:
        return Store(root, require_signed, accept_tensors)
    return MirrorStore(root, bucket, require_signed, accept_tensors)


def open_database(path: Path, bucket: S3Bucket | None) -> Database:
    """The registry of a store."""
    return Database(path) if bucket is None else MirrorDatabase(path, bucket)


class MirrorStore(Store):
    """A `Store` whose masks are objects of a bucket. Masks are copied to the folder when they are needed, and verified.

    What is added is in the bucket before a registry can name it. Trusted keys are those of the folder.
    """

    def __init__(
        self, root: Path, bucket: S3Bucket, require_signed: bool = False, accept_tensors: bool = False
    ) -> None:
        super().__init__(root, require_signed, accept_tensors)
        self._bucket = bucket

    def locate(self, digest: str) -> Path:
        """See `Store`. Raises `BucketUnreachable` if the mask is not here and cannot be fetched."""
        path = self.path(digest)
        if not path.exists():
            with self._fetched(digest) as draft:
                os.replace(draft, self._make_path(digest))
        return path

    def prefers(self, new: Signable, preferred: bool = False) -> bool:
        """See `Store`. The stored copy is the better of the folder's and the bucket's, which is copied here first."""
        if self.path(new.digest).exists():
            with suppress(MaskNotFound, MaskCorrupt), self._fetched(new.digest) as draft:
                if super().prefers(self._summaries.of(draft)):
                    os.replace(draft, self.path(new.digest))
        return super().prefers(new, preferred)

    @contextmanager
    def _fetched(self, digest: str) -> Iterator[Path]:
        """The bucket's copy of a mask, verified, in quarantine. Raises `MaskNotFound` and `DigestMismatch`."""
        draft = self.draft_path()
        try:
            if not self._bucket.download(_name(digest), draft):
                raise MaskNotFound(f"no mask {digest[:16]} in {self._bucket.url}")
            found = read_mask(draft, lenient=True).digest
            if found != digest:
                raise DigestMismatch(f"holds the mask {found[:16]}, not {digest[:16]}", path=Path(_name(digest)))
            yield draft
        finally:
            draft.unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """See `Store`."""
        return sorted(self.ages())

    def ages(self) -> dict[str, tuple[float, int]]:
        """See `Store`; times are the bucket's."""
        found = self._bucket.list("masks")
        return super().ages() | {Path(name).stem: one for name, one in found.items() if name.endswith(SUFFIX)}

    def discard(self, digest: str) -> None:
        """See `Store`."""
        self._bucket.delete(_name(digest))
        super().discard(digest)

    def __contains__(self, digest: str) -> bool:
        return self._bucket.version(_name(digest)) is not None

    def _touch(self, digest: str) -> None:
        super()._touch(digest)
        self._bucket.upload(self.path(digest), _name(digest))


class MirrorDatabase(Database):
    """The registry's file, a copy of an object in a bucket.

    A write takes the bucket's lock, works on a draft of the newest version, and replaces the object on the condition
    that it is still that version. The lock keeps machines from working in vain; the condition alone decides. A crash at
    any point leaves the old or the new registry in the bucket, and a lock that others take over after `LEASE` seconds.
    """

    def __init__(self, path: Path, bucket: S3Bucket) -> None:
        self._bucket = bucket
        self._marker = path.with_suffix(".version")  # of the object that the file is a copy of
        self._exclusive = path.with_suffix(".mirror-lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.refresh()
        super().__init__(path)

    def refresh(self) -> None:
        """Fetch the object if it has another version than the copy."""
        if self._bucket.version(self.path.name) != self._read_marker():
            with files.locked(self._exclusive, TIMEOUT):
                self._fetch()

    def watch(self) -> Watch:
        """See `Database`; it looks at the bucket every `POLL` seconds, in a thread, while it is open."""
        return _Poll(self)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """See `SQLiteFile`. Raises `StoreBusy` if other machines hold the lock, or were first all the same."""
        with files.locked(self._exclusive, TIMEOUT), _Lease(self._bucket) as self._lease:
            version = self._fetch()
            draft = self.path.with_suffix(".draft")
            try:
                if self.path.exists():
                    shutil.copyfile(self.path, draft)
                with self._session("immediate", draft) as db:
                    yield db
                if version is None or draft.read_bytes() != self.path.read_bytes():
                    self._replace(draft, version)
            finally:
                for leftover in (draft, draft.with_name(f"{draft.name}-journal")):
                    leftover.unlink(missing_ok=True)

    def confirm(self) -> None:
        """See `Database`."""
        self._lease.confirm()

    def _replace(self, draft: Path, version: str | None) -> None:
        try:
            written = self._bucket.write(self.path.name, draft.read_bytes(), version)
        except VersionConflict:
            raise StoreBusy("another machine changed the registry meanwhile; try again", path=self.path) from None
        os.replace(draft, self.path)
        self._write_marker(written)

    def _fetch(self) -> str | None:
        """Make the copy the newest version, which is returned; None if the bucket has no registry yet."""
        if self._bucket.version(self.path.name) == (known := self._read_marker()):
            return known
        found = self._bucket.read(self.path.name)
        if found is None:
            self.path.unlink(missing_ok=True)
            self._marker.unlink(missing_ok=True)
            return None
        content, version = found
        with files.replacing(self.path) as file:
            file.write(content)
        self._write_marker(version)
        return version

    def _read_marker(self) -> str | None:
        return self._marker.read_text() if self._marker.exists() and self.path.exists() else None

    def _write_marker(self, version: str) -> None:
        with files.replacing(self._marker) as file:
            file.write(version.encode())


class _Lease:
    """The bucket's lock: an object whose content changes while its owner lives."""

    def __init__(self, bucket: S3Bucket) -> None:
        self._bucket = bucket
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Create the lock, or take over one that stays the same for `LEASE` seconds. Raises `StoreBusy`."""
        deadline, since = time.monotonic() + TIMEOUT, 0.0
        held: str | None = None  # by another machine, and since when
        while time.monotonic() < deadline:
            stale = held if held is not None and time.monotonic() - since > LEASE else None
            with suppress(VersionConflict):
                self._confirmed = time.monotonic()
                self._mine = self._bucket.write(_LOCK, make_token(), stale)
                self._renewal.start()
                return self
            found = self._bucket.version(_LOCK)
            if found != held:
                held, since = found, time.monotonic()
            time.sleep(RETRY)
        raise StoreBusy(f"other machines held the lock of {self._bucket.url} for {TIMEOUT:.0f} s")

    def __exit__(self, *_: object) -> None:
        """Delete the lock, unless another machine has taken it over."""
        self._ended.set()
        self._renewal.join()
        with suppress(BucketUnreachable):  # others take it over
            if self._bucket.version(_LOCK) == self._mine:
                self._bucket.delete(_LOCK)

    def confirm(self) -> None:
        """Raises `StoreBusy` if another machine may take over the lock soon, or has."""
        if time.monotonic() - self._confirmed > LEASE / 2:
            raise StoreBusy(f"the lock of {self._bucket.url} could not be renewed in time; try again")

    def _renew(self) -> None:
        while not self._ended.wait(LEASE / 4):
            now = time.monotonic()
            try:
                self._mine = self._bucket.write(_LOCK, make_token(), self._mine)
                self._confirmed = now
            except VersionConflict:
                return  # the registry's own condition decides then
            except BucketUnreachable:
                continue


class _Poll(Watch):
    """A watch that fetches the registry in a thread of its own, which ends with it."""

    def __init__(self, database: MirrorDatabase) -> None:
        super().__init__(database.path)
        self._database = database
        self._ended: threading.Event | None = None

    def look(self) -> tuple[int, int, int] | None:
        """See `Watch`."""
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._follow, args=(self._ended,), name="bucket", daemon=True).start()
        return super().look()

    def close(self) -> None:
        """See `Watch`; the thread ends."""
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        super().close()

    def _follow(self, ended: threading.Event) -> None:
        reachable = True
        while not ended.wait(POLL):
            try:
                self._database.refresh()
            except (BucketUnreachable, StoreBusy) as error:
                if reachable:
                    _log.warning("personas stay as they were, until the bucket answers again: %s", error)
                reachable = False
            else:
                if not reachable:
                    _log.info("the bucket answers again")
                reachable = True


def _name(digest: str) -> str:
    return f"masks/{digest[:2]}/{digest}{SUFFIX}"
