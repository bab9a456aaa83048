"""Intermediate results of a build, in memory or in a folder from which an interrupted build resumes.

A set of tensors is one safetensors file, which is replaced atomically. A lock keeps a folder to one process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from masquerade.errors import BuildFailed, BuildRunning, BuildUnsaved


class Scratch:
    """Named sets of tensors of one build. They are in memory if `folder` is None; else the folder must be this build's.

    A name is a path such as `hidden/3/own-0`. Raises `BuildUnsaved` with the system's message if the disk is full, and
    `BuildRunning` if another process has locked the folder. It is locked from the first use until `close`, `release` or
    the end of the process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._lock: weakref.finalize[[int], Scratch] | None = None  # closes the locked file

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a name, replacing earlier ones."""
        if self._folder is None:
            self._kept[name] = dict(tensors)
            return
        path = self._path(name)
        part = path.with_suffix(".part")
        self._acquire_lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(save({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}))
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BuildUnsaved(f"cannot keep the build's intermediate results in {path}: {error.strerror}") from error

    def get(self, name: str) -> dict[str, Tensor]:
        """The tensors under a name; on the CPU if they are in a folder."""
        if self._folder is None:
            return self._kept[name]
        path = self._path(name)
        self._acquire_lock()
        try:
            found: dict[str, Tensor] = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise BuildFailed(f"{path} of an earlier build cannot be read: {error}; remove its folder") from error
        return found

    def drop(self, prefix: str) -> None:
        """Delete everything under a name or below it."""
        if self._folder is None:
            self._kept = {name: kept for name, kept in self._kept.items() if not _is_below(name, prefix)}
            return
        self._path(prefix).unlink(missing_ok=True)
        shutil.rmtree(self._folder / prefix, ignore_errors=True)

    def retain(self, *names: str) -> None:
        """Delete everything but what is under these names, which have no slash, or below them."""
        self._kept = {name: kept for name, kept in self._kept.items() if name.split("/")[0] in names}
        if self._folder is None:
            return
        self._acquire_lock()
        for path in self._folder.iterdir():
            if path.is_dir() and path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".safetensors" and path.stem not in names:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete everything, and unlock the folder."""
        self._kept.clear()
        if self._folder is not None and self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Unlock the folder and keep its contents, so that another build can resume."""
        if self._lock is not None:
            self._lock()
        self._lock = None

    def __contains__(self, name: str) -> bool:
        if self._folder is None:
            return name in self._kept
        self._acquire_lock()
        return self._path(name).exists()

    def _acquire_lock(self) -> None:
        while self._folder is not None and self._lock is None:
            path = self._folder / "lock"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # its last owner is removing the folder
                continue
            except OSError as error:
                raise BuildUnsaved(f"cannot keep intermediate results in {self._folder}: {error.strerror}") from error
            lock = weakref.finalize(self, os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock()
                raise BuildRunning(
                    f"the same build is running already: another process works in {self._folder}; wait until it has "
                    "ended, or keep this one's intermediate results elsewhere (--scratch)"
                ) from None
            if path.exists() and path.stat().st_ino == os.fstat(file).st_ino:
                self._lock = lock
            else:  # the file was removed before it was locked
                lock()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + "/")
