"""What builds that did not succeed keep in a store: sizes, ages, and deletion."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = "builds"  # below a store's
DAYS = 7.0  # since the last change, after which `masks gc` deletes what a build keeps


@dataclass(frozen=True)
class KeptBuild:
    """The folder of a build that has not ended, was refused, or could not be saved."""

    folder: Path
    nbytes: int
    age: float  # seconds since the last change


def list_kept_builds(root: Path) -> list[KeptBuild]:
    """The kept builds of a store, by name."""
    return [measure(folder) for folder in sorted((root / FOLDER).glob("*")) if folder.is_dir()]


def measure(folder: Path) -> KeptBuild:
    """Size and age of a build's folder; files may disappear meanwhile."""
    status = list(_read_status(folder))
    changed = max((one.st_mtime for one in status), default=time.time())
    return KeptBuild(folder, sum(one.st_size for one in status), max(0.0, time.time() - changed))


def delete(folder: Path) -> bool:
    """Delete a build's folder. False if a process works in it; it has locked the folder as `pruning.Scratch` does."""
    with suppress(FileNotFoundError), (folder / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _read_status(folder: Path) -> Iterator[os.stat_result]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.stat(os.path.join(parent, name))
