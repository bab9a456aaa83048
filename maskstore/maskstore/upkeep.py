"""Garbage collection and fsck of a store; what cannot be repaired is reported and left as it is."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from maskstore.errors import InvalidMaskValue, MaskCorrupt, MaskError, UnknownVersion, Unreadable
from maskstore.format import MaskReader, read_mask, write_mask
from maskstore.mirror import find_bucket, open_database, open_store
from maskstore.registry import FILE, Registry
from maskstore.store import Store

GRACE = 3600.0  # seconds: a younger mask without a name may be about to be published


@dataclass(frozen=True)
class Collected:
    """What gc removed, or would remove: digests, leftover temporary files, bytes of both."""

    digests: tuple[str, ...]
    leftovers: tuple[str, ...]
    nbytes: int
    dry: bool


@dataclass(frozen=True)
class Finding:
    """One damage: its kind, what it concerns, in words, and what was done about it ("" if nothing)."""

    kind: str
    subject: str
    message: str
    action: str = ""


@dataclass(frozen=True)
class Checkup:
    """What fsck found; leftovers of killed writers are no damage."""

    masks: int
    findings: tuple[Finding, ...]
    leftovers: tuple[str, ...] = field(default=())

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def gc(root: str | os.PathLike[str], dry: bool = False, grace: float = GRACE) -> Collected:
    """Remove masks nothing refers to and leftovers of killed writers, if older than `grace` seconds."""
    registry = Registry(root)
    store = registry.store
    horizon = time.time() - grace
    with store.lock(exclusive=True), registry.referred() as referred:
        old = {
            digest: nbytes
            for digest, (added, nbytes) in sorted(store.ages().items())
            if digest not in referred and added <= horizon
        }
        leftovers = _old_leftovers(store, horizon)
        nbytes = sum(old.values()) + sum(leftovers.values())
        for digest in () if dry else old:
            registry.database.confirm()
            store.discard(digest)
        for path in () if dry else leftovers:
            path.unlink(missing_ok=True)
    return Collected(tuple(old), tuple(_relative(store, path) for path in leftovers), nbytes, dry)


def sweep(root: str | os.PathLike[str], grace: float = GRACE) -> tuple[str, ...]:
    """Remove leftovers of killed writers that are older than `grace` seconds, and nothing else; return their paths."""
    store = Store(root)
    with store.lock(exclusive=True):
        old = _old_leftovers(store, time.time() - grace)
        for path in old:
            path.unlink(missing_ok=True)
    return tuple(_relative(store, path) for path in old)


def fsck(root: str | os.PathLike[str], repair: bool = False) -> Checkup:
    """Verify every mask and every reference. `repair` moves damaged files to `<root>/damaged`, misplaced ones to their
    place, empties objects of the metadata with values of the wrong type, and rebuilds a damaged registry from what the
    masks say about themselves. Raises `UnknownVersion` for the registry of a newer version, and `StoreBusy` or
    `BucketUnreachable` for one that cannot be read now; nothing is changed then.
    """
    bucket = find_bucket(Path(root))
    store = open_store(Path(root), bucket)
    if bucket:
        if repair:
            raise InvalidMaskValue(f"{store.root} is a copy of a bucket: delete the folder, and it is fetched again")
        for digest in store.digests():
            with suppress(MaskError):  # the checks below say what is wrong with it
                store.locate(digest)
    with store.lock(exclusive=repair):
        faults, references = _read_registry(store)  # before the files: what is published meanwhile is not dangling
        sound: dict[str, tuple[str, str]] = {}
        findings = list(_check_files(store, sound, repair))
        findings += _check_registry(store, faults, sound, repair)
        findings += [
            Finding("dangling", subject, f"refers to the mask {digest}, which is missing, damaged or unreadable")
            for subject, digest in references
            if digest not in sound
        ]
        leftovers = tuple(_relative(store, path) for path in _leftovers(store))
    return Checkup(len(sound), tuple(findings), leftovers)


def _leftovers(store: Store) -> list[Path]:
    """Temporary files of running or killed writers."""
    return sorted([*store.masks.glob("??/.*.tmp"), *(store.root / "quarantine").glob("*")])


def _old_leftovers(store: Store, horizon: float) -> dict[Path, int]:
    """Leftovers last written before `horizon`, and their bytes. Quarantine has no lock: files may disappear."""
    found = {}
    for path in _leftovers(store):
        with suppress(FileNotFoundError):
            status = path.stat()
            if status.st_mtime <= horizon:
                found[path] = status.st_size
    return found


def _relative(store: Store, path: Path) -> str:
    return path.relative_to(store.root).as_posix()


def _check_files(store: Store, sound: dict[str, tuple[str, str]], repair: bool) -> Iterator[Finding]:
    """Read everything below masks/; fill `sound` with digest -> (created_at, persona)."""
    waiting = set(_leftovers(store))
    for path in sorted(path for path in store.masks.rglob("*") if not path.is_dir() or path.is_symlink()):
        if path in waiting:
            continue
        try:
            with MaskReader(path, lenient=True) as reader:
                reader.check()
        except (Unreadable, UnknownVersion) as error:  # it may be sound
            yield Finding("unreadable", _relative(store, path), error.message)
            continue
        except MaskError as error:
            action = _set_aside(store, path) if repair else ""
            yield Finding("damaged", _relative(store, path), f"{type(error).__name__}: {error.message}", action)
            continue
        if path != store.path(reader.digest):
            action = _put_right(store, path, reader) if repair else ""
            yield Finding("misplaced", _relative(store, path), f"is the mask {reader.digest}", action)
            if not action:
                continue
        if reader.header.faults:
            action = _mend(store, reader.digest) if repair else ""
            yield Finding("metadata", _relative(store, path), "; ".join(reader.header.faults), action)
        sound[reader.digest] = (reader.info.created_at, reader.info.persona)


def _set_aside(store: Store, path: Path) -> str:
    folder = store.root / "damaged"
    folder.mkdir(exist_ok=True)
    names = chain([path.name], (f"{path.name}.{number}" for number in count(1)))
    target = next(folder / name for name in names if not os.path.lexists(folder / name))
    os.replace(path, target)
    return f"moved to {_relative(store, target)}"


def _put_right(store: Store, path: Path, head: MaskReader) -> str:
    """Move a mask to the path of its digest, or aside if there is a sound copy that is no worse."""
    target = store.path(head.digest)
    if _is_sound(target) and not store.prefers(head):
        return _set_aside(store, path)
    target.parent.mkdir(exist_ok=True)
    os.replace(path, target)
    return f"moved to {_relative(store, target)}"


def _is_sound(path: Path) -> bool:
    try:
        with MaskReader(path, lenient=True) as reader:
            reader.check()
    except MaskError:
        return False
    return True


def _mend(store: Store, digest: str) -> str:
    """Write a mask again as a lenient reader sees it; its tensors, and so its digest, stay."""
    path = store.path(digest)
    write_mask(read_mask(path, lenient=True), path)
    return "written again with those objects empty"


def _read_registry(store: Store) -> tuple[list[str], list[tuple[str, str]]]:
    """The faults of the registry, and its references if there are none. What only keeps it from being read now, such as
    a lock or a newer version, is no fault, and is raised.
    """
    path = store.root / FILE
    if not path.exists():
        return ["is missing"], []
    try:
        faults = open_database(path, find_bucket(store.root)).faults()
        return faults, [] if faults else Registry(store.root).references()
    except MaskCorrupt as error:
        return [error.message], []


def _check_registry(
    store: Store, faults: list[str], sound: dict[str, tuple[str, str]], repair: bool
) -> Iterator[Finding]:
    path = store.root / FILE
    if not path.exists() and not sound:
        return
    action = ""
    if faults and repair:
        aside = [_set_aside(store, each) for each in (path, path.with_name(f"{FILE}-journal")) if each.exists()]
        action = ", ".join([*aside, _rebuild(store, sound)])
    yield from (Finding("registry", FILE, fault, action) for fault in faults)


def _rebuild(store: Store, sound: dict[str, tuple[str, str]]) -> str:
    """A registry from the masks alone: each under the persona in its metadata, in order of creation."""
    registry = Registry(store.root)
    for digest, (_, persona) in sorted(sound.items(), key=lambda item: (item[1][0], item[0])):
        registry.publish(persona, digest)
    return f"rebuilt {len(registry.names())} personas from {len(sound)} masks"
