"""Safe file access: regular files only, reads in chunks, atomic and durable replacement."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from maskstore.errors import MaskNotFound, MaskTruncated, NotAMask, StoreBusy, Unreadable

CHUNK = 1 << 20


class Stamp(NamedTuple):
    """What changes when a file does; times in ns."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


_NO_FILES = {errno.ELOOP: "a symbolic link", errno.ENXIO: "a socket or a device"}


def stamp(path: Path) -> Stamp:
    """The stamp of a mask's file. Raises MaskNotFound without one."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        raise MaskNotFound(f"no mask {path.stem[:16]}") from None
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor and a size; only of a regular file, never through a link, never waiting for a pipe."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MaskNotFound("no such file") from None
    except OSError as error:
        if error.errno in _NO_FILES:
            raise NotAMask(f"is {_NO_FILES[error.errno]}, not a regular file") from None
        raise Unreadable(f"cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise NotAMask(f"is not a regular file (mode {stat.filemode(status.st_mode)})")
        yield file, status.st_size
    finally:
        os.close(file)


def chunks(file: int, offset: int, length: int, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a range through one buffer; a chunk is valid until the next. Mapped pages would count as memory."""
    end = offset + length
    while offset < end:
        try:
            count = os.preadv(file, [buffer[: end - offset]], offset)
        except OSError as error:
            raise Unreadable(f"cannot be read at byte {offset}: {error.strerror}") from None
        if not count:
            raise MaskTruncated(f"the file shrank while it was read: nothing at byte {offset}")
        yield buffer[:count]
        offset += count


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that durably replaces `path` when the block ends; an exception deletes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def locked(path: Path, timeout: float, exclusive: bool = True) -> Iterator[None]:
    """Hold a file's lock, alone or with others. The kernel releases the lock of a process that dies.

    Raises `StoreBusy` after `timeout` seconds.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    with open(path, "ab") as file:
        deadline = time.monotonic() + timeout
        while not _try_lock(file.fileno(), kind):
            if time.monotonic() > deadline:
                raise StoreBusy(f"locked by another process for {timeout:.0f} s", path=path.parent)
            time.sleep(0.01)
        yield


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
