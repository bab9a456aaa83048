"""Masks on disk, as they are taken from there.

Knows which files were verified, and how to verify a large one quickly. Refuses to know names of personas and devices.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from maskstore import Mask, MaskNotFound, MaskReader, Sparse, Store

LARGE = 2**24  # bytes from which several threads verify a file
SETTLED = 2.0  # seconds after which a file's time stamps tell every later change


class Stamp(NamedTuple):
    """What changes when a file does; times in ns."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


class VerifiedStore:
    """The masks of a store for one base. Safe for several threads.

    Bitmaps are mapped from their files, so that taking one costs no memory beside the system's cache of files and no
    copy; lists are copied, because kernels use their columns as addresses. Files of a store are replaced, never
    written to: who truncates one that is mapped ends the process.

    A file is verified (a sha256 pass over all its bytes) the first time it is read, and again whenever its device,
    inode, size, mtime or ctime is another one. Until then only what a kernel relies on is checked again: header,
    identity of base and mask, shapes, pad bits, order and range of columns. That is safe against whatever happens to
    files: nothing writes to one without changing its ctime, which cannot be set, and a file that changed less than two
    seconds before it was verified is not trusted, because two changes may then share a time stamp. It is no defence
    against hardware that returns other bytes for an unchanged file, nor against a process that had it mapped for
    writing before; both could as well change the bytes after any other check.
    """

    def __init__(self, store: Store, base: str) -> None:
        self._store = store
        self._base = base  # fingerprint
        self._verified: dict[str, Stamp] = {}

    def open(self, digest: str) -> MaskReader:
        """What a mask's file says about itself, without touching a tensor; raises `MaskError`."""
        return self._store.reader(digest, self._base)

    def read(self, digest: str) -> Mask:
        """A verified mask, mapped into memory; raises the `MaskError` that says what is wrong."""
        path, started = self._store.path(digest), time.time()
        stamp = _stamp(path)
        known = self._verified.get(digest) == stamp
        if stamp.size >= LARGE:
            _share_out(path, _touch if known else _verify)
            known = True
        mask = self._store.open(digest, self._base, verify=not known)
        if _stamp(path) != stamp:
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


def _stamp(path: Path) -> Stamp:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        raise MaskNotFound(f"no mask {path.stem[:16]}") from None
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _share_out(path: Path, work: Callable[[Path, Sequence[str]], None]) -> None:
    """Do something with all modules of a large file, on several threads."""
    with MaskReader(path, lenient=True) as reader:
        names = reader.names
    threads = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "reader") as pool:
        for outcome in [pool.submit(work, path, names[start::threads]) for start in range(threads)]:
            outcome.result()


def _verify(path: Path, names: Sequence[str]) -> None:
    """Hash some modules, each dropped again."""
    with MaskReader(path, lenient=True) as reader:
        for name in names:
            reader[name]


def _touch(path: Path, names: Sequence[str]) -> None:
    """Have some modules in the system's cache, so that no step of the engine waits for the disk."""
    with MaskReader(path, verify=False, lenient=True) as reader, path.open("rb", buffering=0) as file:
        buffer = bytearray(2**20)
        for name in names:
            for tensor in reader.header.modules[name].tensors.values():
                file.seek(reader.header.start + tensor.offset)
                for _ in range(0, tensor.nbytes, len(buffer)):
                    file.readinto(buffer)
