"""Export and import of masks as files; an imported file stays in quarantine until it is verified."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from maskstore import files
from maskstore.delta import DeltaReader, write_delta
from maskstore.errors import MaskError
from maskstore.format import MaskReader, read_header, write_mask
from maskstore.mask import Mask, MaskInfo
from maskstore.store import Store


@dataclass(frozen=True)
class Exported:
    """The written file: a whole mask, or a delta against `parent`."""

    digest: str
    parent: str | None
    nbytes: int


def export_mask(
    store: Store,
    digest: str,
    path: str | os.PathLike[str],
    against: str | None = None,
    info: MaskInfo | None = None,
) -> Exported:
    """Write a mask as one file, verified on the way: as a delta against another kept mask if that is smaller.

    `info` replaces the metadata, unless they are signed.
    """
    path = Path(path)
    mask = store.open(digest)
    if info is not None and mask.signature is None:
        mask = replace(mask, info=info)
    if against is not None:
        write_delta(mask, store.open(against), path)
        if path.stat().st_size < store.path(digest).stat().st_size:
            return Exported(digest, against, path.stat().st_size)
    write_mask(mask, path)
    return Exported(digest, None, path.stat().st_size)


def import_mask(store: Store, path: str | os.PathLike[str], base: str | None = None) -> Mask:
    """Import a mask from a file, whole or delta, after all of it is verified.

    `base` is the required fingerprint. A delta needs its parent in the store. Returns the copy that the store keeps,
    which may be an older one (see Store).
    """
    path = Path(path)
    try:
        with _quarantined(store, path) as copy:
            digest = _accept(store, copy, base)
    except MaskError as error:
        error.path = path  # of the caller's file, not of the copy in quarantine
        raise
    return store.open(digest, verify=False)


def read_info(path: str | os.PathLike[str]) -> MaskInfo:
    """What a mask file says about itself, unverified; the copy of that mask in a store may say something else."""
    with files.opened(Path(path)) as (file, size):
        return read_header(file, size).info


def _accept(store: Store, copy: Path, base: str | None) -> str:
    """Verify the copy and move it in; a delta is written as a whole mask first."""
    with files.opened(copy) as (file, size):
        header = read_header(file, size)
    if header.parent is None:
        with MaskReader(copy, base) as reader:
            reader.check()
            store.admit(reader)
    else:
        with DeltaReader(copy, store.open, base) as reader:
            mask = reader.mask()
        store.admit(mask)
        write_mask(mask, copy)
    return store.adopt(copy, header)


@contextmanager
def _quarantined(store: Store, path: Path) -> Iterator[Path]:
    """A private copy below the store's root, deleted afterwards unless it was moved into the store."""
    copy = store.draft_path()
    buffer = memoryview(bytearray(files.CHUNK))
    try:
        with files.opened(path) as (file, size), files.replacing(copy) as out:
            for chunk in files.chunks(file, 0, size, buffer):
                out.write(chunk)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
