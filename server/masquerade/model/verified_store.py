"""Reads masks from a store and verifies each file when it is new or has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maskstore import Mask, MaskReader, Sparse, Store, files

LARGE = 2**24  # smallest file, in bytes, that several threads verify
SETTLED = 2.0  # seconds after which any later change gives a file another time stamp


class VerifiedStore:
    """The masks of a store for one base. Thread-safe.

    Bitmaps are mapped from their files, which needs no copy and no memory beyond the page cache. Lists are copied,
    because kernels use their columns as addresses. Replace a store's files and never write to them: a process dies if
    one of its mapped files is truncated.

    The first read of a file verifies it (sha256 over all bytes), and so does any read after its device, inode, size,
    mtime or ctime has changed. Other reads check only what kernels rely on: header, identity of base and mask, shapes,
    pad bits, order and range of columns. This detects every change of a file: a write always changes its ctime, which
    cannot be set, and a file that changed less than two seconds before its verification is verified again, because two
    changes may share a time stamp. It does not detect hardware that returns other bytes for an unchanged file, nor
    writes through a mapping made earlier; both could also happen after any other check.
    """

    def __init__(self, store: Store, base: str) -> None:
        self._store = store
        self._base = base  # fingerprint
        self._verified: dict[str, files.Stamp] = {}

    def open(self, digest: str) -> MaskReader:
        """Open a mask's file and read its header. Raises `MaskError`."""
        return self._store.reader(digest, self._base)

    def read(self, digest: str) -> Mask:
        """A verified mask, mapped into memory. Raises `MaskError`."""
        path, started = self._store.locate(digest), time.time()
        stamp = files.stamp(path)
        known = self._verified.get(digest) == stamp
        if stamp.size >= LARGE:
            _in_parallel(path, _touch if known else _verify)
            known = True
        mask = self._store.open(digest, self._base, verify=not known)
        if files.stamp(path) != stamp:
            mask = self._store.open(digest, self._base)
        elif stamp.ctime < (started - SETTLED) * 1e9:
            self._verified[digest] = stamp
        return _copy_lists(mask)


def _copy_lists(mask: Mask) -> Mask:
    targets = {
        name: Sparse(target.rows.copy(), target.cols.copy(), target.columns) if isinstance(target, Sparse) else target
        for name, target in mask.targets.items()
    }
    return Mask.known(mask.base, targets, mask.info, mask.signature, mask.leaves)


def _in_parallel(path: Path, work: Callable[[Path, Sequence[str]], None]) -> None:
    """Divide the modules of a large file among threads."""
    with MaskReader(path, lenient=True) as reader:
        names = reader.names
    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "reader") as pool:
        for outcome in [pool.submit(work, path, names[start::threads]) for start in range(threads)]:
            outcome.result()


def _verify(path: Path, names: Sequence[str]) -> None:
    """Read modules, which verifies their hashes, and discard them."""
    with MaskReader(path, lenient=True) as reader:
        for name in names:
            reader[name]


def _touch(path: Path, names: Sequence[str]) -> None:
    """Read modules into the page cache, so that no step of the engine waits for the disk."""
    with MaskReader(path, verify=False, lenient=True) as reader, path.open("rb", buffering=0) as file:
        buffer = bytearray(2**20)
        for name in names:
            for tensor in reader.header.modules[name].tensors.values():
                file.seek(reader.header.start + tensor.offset)
                for _ in range(0, tensor.nbytes, len(buffer)):
                    file.readinto(buffer)
