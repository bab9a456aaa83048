"""Where unfinished work lies: in memory, or in a folder where a killed build finds it again.

Knows named sets of tensors, as safetensors files that are there whole or not at all, and that a folder is one process'
at a time. Refuses to know what they mean.
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

from masquerade.errors import BuildFailed


class Scratch:
    """Named tensors of one build. `folder` None keeps them in memory; a folder is made, and must be this build's own.

    A name is a path such as `hidden/3/own-0`. Raises `BuildFailed` with the system's words when the disk is full, and
    when another build holds the folder, which is locked from the first use until `close`, `release` or the end of the
    process, however it ends.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._lock: weakref.finalize[[int], Scratch] | None = None  # closes the file whose lock is held

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in place of what was there."""
        if self._folder is None:
            self._kept[name] = dict(tensors)
            return
        path = self._path(name)
        part = path.with_suffix(".part")
        self._hold()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(save({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}))
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BuildFailed(f"cannot keep the build's intermediate results in {path}: {error.strerror}") from error

    def get(self, name: str) -> dict[str, Tensor]:
        """What was put under a name; on the CPU if it was in a folder."""
        if self._folder is None:
            return self._kept[name]
        path = self._path(name)
        self._hold()
        try:
            found: dict[str, Tensor] = load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise BuildFailed(f"{path} of an earlier build cannot be read: {error}; remove its folder") from error
        return found

    def drop(self, prefix: str) -> None:
        """Forget everything under a name or below it."""
        if self._folder is None:
            self._kept = {name: kept for name, kept in self._kept.items() if not _is_below(name, prefix)}
            return
        self._path(prefix).unlink(missing_ok=True)
        shutil.rmtree(self._folder / prefix, ignore_errors=True)

    def close(self) -> None:
        """Forget everything: the work is finished."""
        self._kept.clear()
        if self._folder is not None and self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another build go on with what lies there."""
        if self._lock is not None:
            self._lock()
        self._lock = None

    def __contains__(self, name: str) -> bool:
        if self._folder is None:
            return name in self._kept
        self._hold()
        return self._path(name).exists()

    def _hold(self) -> None:
        while self._folder is not None and self._lock is None:
            path = self._folder / "lock"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # who held the folder is just removing it
                continue
            except OSError as error:
                raise BuildFailed(f"cannot keep intermediate results in {self._folder}: {error.strerror}") from error
            lock = weakref.finalize(self, os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock()
                raise BuildFailed(
                    f"the same build is running already: another process works in {self._folder}; wait until it has "
                    "ended, or keep this one's intermediate results elsewhere (--scratch)"
                ) from None
            if path.exists() and path.stat().st_ino == os.fstat(file).st_ino:
                self._lock = lock
            else:  # it was removed before it was locked
                lock()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + "/")
