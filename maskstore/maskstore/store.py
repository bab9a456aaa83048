"""A folder of mask files addressed by digest: atomic writes, locks, and which copy of a digest is kept."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskstore import files, signing
from maskstore.errors import DigestMismatch, MaskCorrupt, MaskNotFound
from maskstore.format import MaskReader, MaskWriter, read_mask, write_mask
from maskstore.header import Header
from maskstore.mask import BaseRef, Mask, MaskInfo
from maskstore.names import check_digest
from maskstore.signing import Signable
from maskstore.summary import Summaries, Summary

SUFFIX = ".safetensors"
TIMEOUT = 30.0


class Store:
    """A folder of immutable mask files, `<root>/masks/<first two digits>/<digest>.safetensors`.

    A digest covers base and tensors, so copies of one mask may differ in metadata and signature. One copy
    is kept: the one whose signature has the higher `signing.Standing` with the keys that are trusted at the time; of
    equal ones, a copy that was built here; otherwise the one that was there first. A copy whose header is damaged gives
    way to any other, and one with faulty metadata to one that is as well signed.

    With `require_signed`, masks are opened and taken in only if a trusted key signed everything about them, or, with
    `accept_tensors`, at least their tensors.
    """

    def __init__(
        self, root: str | os.PathLike[str], require_signed: bool = False, accept_tensors: bool = False
    ) -> None:
        self.root = Path(root)
        self.require_signed = require_signed
        self.accept_tensors = accept_tensors
        self._summaries = Summaries()
        self.keys = signing.TrustedKeys(self.root / "trusted-keys")
        self.masks = self.root / "masks"
        self.masks.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """The path of a digest, whether or not it is stored."""
        return self.masks / check_digest(digest)[:2] / f"{digest}{SUFFIX}"

    def locate(self, digest: str) -> Path:
        """The path of a stored digest. Raises `MaskNotFound`."""
        path = self.path(digest)
        if not path.exists():
            raise MaskNotFound(f"no mask {digest[:16]} in {self.root}")
        return path

    def add(self, mask: Mask, preferred: bool = False) -> str:
        """Store a mask, unless the stored copy is better (see above), and return its digest.

        `preferred` is for a mask that was built here where the stored copy was not.
        """
        with self.lock():
            if self.prefers(mask, preferred):
                self._write(mask, lambda: self.prefers(mask, preferred))
            else:
                self._touch(mask.digest)
        return mask.digest

    def replace(self, mask: Mask) -> str:
        """Store this copy of a mask in place of any other, as the operator decided. Return its digest."""
        with self.lock():
            self._write(mask, lambda: True)
        return mask.digest

    def adopt(self, path: Path, head: Signable) -> str:
        """Move a verified file, of the same file system, into the store unless the stored copy is better.

        Either way `path` no longer exists. Return the digest.
        """
        with self.lock():
            self._place(path, head.digest, lambda: self.prefers(head))
        return head.digest

    def open(self, digest: str, base: str | None = None, verify: bool = True) -> Mask:
        """The mask of a digest, mapped into memory; `base` is the required fingerprint."""
        path = self.locate(digest)
        mask = read_mask(path, base, verify, lenient=True)
        if mask.digest != digest:
            raise DigestMismatch(f"holds the mask {mask.digest[:16]}, not the one it is named after", path=path)
        self.admit(mask)
        return mask

    def admit(self, signed: Signable) -> None:
        """Raise SignatureError if a mask is not signed as this store requires."""
        if self.require_signed:
            signing.check(signed, self.keys.trusted(), self.accept_tensors)

    def summary(self, digest: str) -> Summary:
        """The header of a mask's file; cached until the file changes."""
        return self._summaries.of(self.locate(digest))

    def reader(self, digest: str, base: str | None = None) -> MaskReader:
        """A MaskReader of the mask's file: its header without tensors, or its modules one at a time."""
        return MaskReader(self.locate(digest), base, lenient=True)

    @contextmanager
    def writing(self, base: BaseRef, info: MaskInfo) -> Iterator[MaskWriter]:
        """A MaskWriter for masks larger than memory; the mask is stored when the block ends without an error."""
        path = self.draft_path()
        with MaskWriter(path, base, info) as writer:
            yield writer
        with self.lock():
            head = Header(base, info, writer.digest, {})
            self._place(path, head.digest, lambda: self.prefers(head))

    def quarantine(self) -> Path:
        """The folder for files that are not masks of this store yet; files that stay there are leftovers."""
        folder = self.root / "quarantine"
        folder.mkdir(exist_ok=True)
        return folder

    def digests(self) -> list[str]:
        """The stored digests, sorted."""
        return sorted(self.ages())

    def ages(self) -> dict[str, tuple[float, int]]:
        """The stored digests, with the time at which each was added last (Unix) and its bytes."""
        found = {}
        for path in self.masks.glob(f"??/{'[0-9a-f]' * 64}{SUFFIX}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found[path.stem] = (status.st_mtime, status.st_size)
        return found

    def discard(self, digest: str) -> None:
        """Remove a mask; nothing may refer to it."""
        self.path(digest).unlink(missing_ok=True)

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).exists()

    def prefers(self, new: Signable, preferred: bool = False) -> bool:
        """Whether a copy is better than the stored one, or none is stored. See `add` for `preferred`."""
        try:
            kept = self.summary(new.digest)
        except (MaskNotFound, MaskCorrupt):
            return True
        trusted = self.keys.trusted()
        theirs, ours = signing.rank(new, trusted), signing.rank(kept, trusted)
        return theirs >= ours if preferred or kept.faults else theirs > ours

    def _write(self, mask: Mask, wanted: Callable[[], bool]) -> None:
        path = self.draft_path()
        try:
            write_mask(mask, path)
            self._place(path, mask.digest, wanted)
        finally:
            path.unlink(missing_ok=True)

    def _place(self, path: Path, digest: str, wanted: Callable[[], bool]) -> None:
        """Move a file to the path of its digest if `wanted()`, else delete it.

        One writer at a time decides, so that the better copy wins.
        """
        with self.lock(exclusive=True, name="copies-lock"):
            if wanted():
                target = self._make_path(digest)
                os.replace(path, target)
                files.sync_folder(target.parent)
        path.unlink(missing_ok=True)
        self._touch(digest)

    def _touch(self, digest: str) -> None:
        """Set the file's modification time to now, so that gc leaves it until it is published."""
        os.utime(self.path(digest))

    def draft_path(self) -> Path:
        """A new path in quarantine."""
        return self.quarantine() / f"{secrets.token_hex(8)}{SUFFIX}"

    @contextmanager
    def lock(self, exclusive: bool = False, name: str = "lock") -> Iterator[None]:
        """Lock the store: shared to add, exclusive to remove. The kernel releases the lock of a process that dies."""
        with files.locked(self.root / name, TIMEOUT, exclusive):
            yield

    def _make_path(self, digest: str) -> Path:
        """The path of a digest; creates its folder."""
        path = self.path(digest)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            files.sync_folder(self.masks)
        return path
