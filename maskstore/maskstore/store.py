"""Masks by content. Knows where a digest lies on disk and how it gets there whole; knows no names and no history."""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskstore import files, signing
from maskstore.errors import DigestMismatch, MaskNotFound, StoreBusy
from maskstore.format import MaskReader, MaskWriter, read_mask, write_mask
from maskstore.mask import BaseRef, Mask, MaskInfo
from maskstore.names import check_digest

SUFFIX = ".safetensors"
TIMEOUT = 30.0


class Store:
    """A folder of immutable mask files, `<root>/masks/<first two digits>/<digest>.safetensors`."""

    def __init__(self, root: str | os.PathLike[str], require_signed: bool = False) -> None:
        self.root = Path(root)
        self.require_signed = require_signed
        self.keys = signing.TrustedKeys(self.root / "trusted-keys")
        self.masks = self.root / "masks"
        self.masks.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a digest lies, or would lie."""
        return self.masks / check_digest(digest)[:2] / f"{digest}{SUFFIX}"

    def add(self, mask: Mask) -> str:
        """Keep a mask and return its digest; of equal masks the first file stays, unless only the later is signed."""
        with self.lock():
            path = self._seat(mask.digest)
            if self._wants(mask.digest, mask.signature):
                write_mask(mask, path)
            os.utime(path)  # young again: a collector leaves it to whoever is about to publish it
        return mask.digest

    def adopt(self, path: Path, digest: str, signature: str | None) -> str:
        """Move in a file that was verified to be this digest, on the same file system; return the digest."""
        with self.lock():
            seat = self._seat(digest)
            if self._wants(digest, signature):
                os.replace(path, seat)
                files.sync_folder(seat.parent)
            else:
                path.unlink()
            os.utime(seat)
        return digest

    def open(self, digest: str, base: str | None = None, verify: bool = True) -> Mask:
        """The mask of a digest, mapped into memory; `base` is the fingerprint it must be for."""
        path = self.path(digest)
        if not path.exists():
            raise MaskNotFound(f"no mask {digest[:16]} in {self.root}")
        mask = read_mask(path, base, verify)
        if mask.digest != digest:
            raise DigestMismatch(f"holds the mask {mask.digest[:16]}, not the one it is named after", path=path)
        self.admit(digest, mask.signature)
        return mask

    def admit(self, digest: str, signature: str | None) -> None:
        """SignatureError if this store requires signatures and this is none of a trusted key."""
        if self.require_signed:
            signing.check(digest, signature, self.keys.trusted())

    def reader(self, digest: str, base: str | None = None) -> MaskReader:
        """The mask's file as a MaskReader: what it says without touching a tensor, or its modules one at a time."""
        path = self.path(digest)
        if not path.exists():
            raise MaskNotFound(f"no mask {digest[:16]} in {self.root}")
        return MaskReader(path, base)

    @contextmanager
    def writing(self, base: BaseRef, info: MaskInfo) -> Iterator[MaskWriter]:
        """A MaskWriter whose mask is kept, under its digest, when the block ends well: for masks larger than memory."""
        folder = self.quarantine()
        path = folder / f"{secrets.token_hex(8)}{SUFFIX}"
        with MaskWriter(path, base, info) as writer:
            yield writer
        self.adopt(path, writer.digest, None)

    def quarantine(self) -> Path:
        """The folder for files that are not masks of this store yet; whatever stays there is a leftover."""
        folder = self.root / "quarantine"
        folder.mkdir(exist_ok=True)
        return folder

    def digests(self) -> list[str]:
        """Every digest kept, sorted."""
        return sorted(path.stem for path in self.masks.glob(f"??/{'[0-9a-f]' * 64}{SUFFIX}"))

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()

    def _wants(self, digest: str, signature: str | None) -> bool:
        """Whether a mask is new here, or brings the first signature."""
        path = self.path(digest)
        if not path.exists():
            return True
        if signature is None:
            return False
        with MaskReader(path) as reader:
            return reader.header.signature is None

    @contextmanager
    def lock(self, exclusive: bool = False) -> Iterator[None]:
        """Hold the store: shared to add, exclusive to take away. The kernel lets go for a process that dies."""
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        with open(self.root / "lock", "ab") as file:
            deadline = time.monotonic() + TIMEOUT
            while not _try_lock(file.fileno(), kind):
                if time.monotonic() > deadline:
                    raise StoreBusy(f"locked by another process for {TIMEOUT:.0f} s", path=self.root)
                time.sleep(0.01)
            yield

    def _seat(self, digest: str) -> Path:
        """The path of a digest, its folder made."""
        path = self.path(digest)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            files.sync_folder(self.masks)
        return path


def _try_lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
