"""The folder of a store: its default path, whether it is usable, and the personas that ship, in a new one."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from maskstore import Mask, MaskError, MaskReader, Registry, Revision, Store, database, mirror
from maskstore.bucket import SCHEME
from maskstore.registry import FILE
from maskstore.sqlite import read_version
from masquerade import demo, smollm2
from masquerade.database import migrations
from masquerade.errors import InvalidValue, StorageFull, StoreTooNew, UnusableStore
from masquerade.sources import find_model

if TYPE_CHECKING:
    from masquerade.database.postgresql import PostgreSQL

UNFINISHED = "new-store"  # a file that is there until a new store has the personas that ship
LEAST_BYTES = 2**24  # of free space, without which no command that writes starts
SHIPPED = (demo.PERSONAS, smollm2.PERSONAS)
SCHEMAS = {
    "registry.sqlite": database.SCHEMA,
    "keys.sqlite": len(migrations.KEYS),
    "jobs/jobs.sqlite": len(migrations.JOBS),
}


def locate_store(text: str) -> Path:
    """The folder of a store that is given as a folder, or as a bucket, of which it is this machine's copy.

    Raises `InvalidValue` for a URL without a bucket.
    """
    if not text.startswith(SCHEME):
        return Path(text)
    if not text.removeprefix(SCHEME).strip("/"):
        raise InvalidValue(f"--store is {text!r}; name the bucket, as in s3://BUCKET/PREFIX")
    return _data_folder() / mirror.name_folder(text)


def find_store(root: Path | None, model: str) -> Path:
    """The folder of the store, by default the model's; it may not exist yet."""
    if root:
        return root
    files = find_model(model)
    return _default(files.name, files.fingerprint())


def check_store(root: Path) -> None:
    """Create the folder of a store if needed, and check that it is usable, before the model is loaded.

    Raises `UnusableStore`, or `StorageFull` where less than `LEAST_BYTES` are free.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise UnusableStore(
            f"the store {root} cannot be written by user {os.getuid()}: {error.strerror or error}; give the folder to "
            "this user, or name another one with --store"
        ) from error
    if free < LEAST_BYTES:
        raise StorageFull(
            f"the store {root} has {free} bytes of free space, and a server needs {LEAST_BYTES}; make room "
            "(`masquerade masks gc`), or name another folder with --store"
        )
    for name, known in SCHEMAS.items():
        _check_schema(root / name, known)


def check_keys(root: Path, database: PostgreSQL) -> None:
    """Raises `UnusableStore` if a store has keys in its file and its database none: it would be open to everybody."""
    from masquerade.keys.table import FILE, KeyTable

    if (root / FILE).exists() and KeyTable(root).all() and not KeyTable(root, database).all():
        database.close()
        raise UnusableStore(
            f"{root / FILE} has keys and the database {database.url} has none; `masquerade keys copy` copies "
            "them, or move the file away to start without them"
        )


def _check_schema(path: Path, known: int) -> None:
    if not path.exists():
        return
    try:
        found = read_version(path)
    except sqlite3.Error as error:
        raise UnusableStore(f"{path} cannot be read: {error}; restore it from a backup") from error
    if found > known:
        raise StoreTooNew(path, found, known)


def open_store(
    root: Path | None,
    base_name: str,
    base_fingerprint: str,
    *,
    creates: bool = True,
    require_signed: bool = False,
    accept_tensors: bool = False,
) -> tuple[Store, Registry]:
    """Open the store in `root`, by default the base's own; the requirements on signatures are those of `Store`.

    A new store gets the personas that ship for its base. Unless `creates`, raises `InvalidValue` for a `root` without a
    store, which may be a typing error.
    """
    is_there = root is None or mirror.find_url(root) is not None or any((root / name).exists() for name in SCHEMAS)
    if not (creates or is_there):
        raise InvalidValue(f"there is no store in {root}")
    root = root or _default(base_name, base_fingerprint)
    unfinished = root / UNFINISHED
    if not (root / FILE).exists():
        root.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    registry = Registry(root, require_signed, accept_tensors)
    if unfinished.exists():
        if registry.database.is_new or not mirror.find_url(root):  # a bucket may have had a registry before this copy
            _publish_shipped(registry, base_fingerprint)
        unfinished.unlink(missing_ok=True)
    return registry.store, registry


def _publish_shipped(registry: Registry, base_fingerprint: str) -> None:
    """Publish what ships for a base and is not there, as after a start that was killed."""
    known = {revision.name for revision in registry.names()}
    for file in _find_shipped():
        with MaskReader(file) as reader:
            if reader.base.fingerprint == base_fingerprint and reader.info.persona not in known:
                registry.publish(reader.info.persona, registry.store.add(reader.mask()))


def _find_shipped() -> list[Path]:
    return [file for folder in SHIPPED for file in sorted(folder.glob("*.safetensors"))]


def open_opposite(registry: Registry, mask: Mask) -> tuple[Revision, Mask] | None:
    """The persona that a mask was built against, as it is now: its current revision and mask, if they can be read."""
    if mask.info.opposite is None:
        return None
    try:
        revision = registry.resolve(mask.info.opposite)
        return revision, registry.store.open(revision.digest, base=mask.base.fingerprint)
    except MaskError:
        return None


def _default(base_name: str, base_fingerprint: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", base_name.lower()).strip("-")
    return _data_folder() / f"{slug}-{base_fingerprint[:8]}"


def _data_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "masquerade"
