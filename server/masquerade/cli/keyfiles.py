"""Keys from files with one token each, such as secrets of Docker or Kubernetes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from masquerade.database.postgresql import PostgreSQL
from masquerade.errors import InvalidValue
from masquerade.keys import Audit, Key, Scope
from masquerade.keys.key import SCOPES, find_scope, is_scrypt, looks_random, matches, matches_scrypt, seal, split
from masquerade.keys.table import KeyTable

_log = logging.getLogger(__name__)
_BYTES = 1024  # maximum size of a token's file


def add_missing(root: Path, files: Sequence[str], database: PostgreSQL | None = None) -> int:
    """Add the key in each file (`scope=path`) to the store, unless its id is there; return the number of all keys.

    A revoked key stays revoked, and a key stays valid when its file is removed. Raises `InvalidValue` if a file has
    no valid token, if a new secret is not random, or if the store has another secret or scope for the id.
    """
    table = KeyTable(root, database)
    for option in files:
        scope, path = _parse(option)
        key_id, secret = _read(path)
        known = {key.id: (key, kept) for key, kept in table.all().items()}
        if key_id not in known:
            if not looks_random(secret):
                raise InvalidValue(f"the secret in {path} is not random; make one with `openssl rand -hex 24`")
            now = time.time()
            key = Key(key_id, path.name, frozenset({scope}), ("*",), None, None, now, None, None)
            if table.add(key, seal(key_id, secret).hash):
                Audit(root).write(key=None, action="add_key", target=key_id, outcome="done")
                continue
            known = {key.id: (key, kept) for key, kept in table.all().items()}  # another server was first
        key, kept = known[key_id]
        if not (matches_scrypt if is_scrypt(kept) else matches)(secret, kept):
            raise InvalidValue(
                f"{path} has another secret for the key {key_id} than the store; make a new key with a new id"
            )
        if key.scopes != {scope}:
            raise InvalidValue(f"the key {key_id} of {path} has the scopes {' '.join(sorted(key.scopes))}, not {scope}")
        if problem := key.problem(time.time()):
            _log.warning("the key %s of %s is %s", key_id, path, problem)
    return len(table.all())


def _parse(given: str) -> tuple[Scope, Path]:
    name, _, path = given.partition("=")
    scope = find_scope(name)
    if scope is None or not path:
        raise InvalidValue(f"{given!r:.80} is not SCOPE=FILE, with one of the scopes {', '.join(SCOPES)}")
    return scope, Path(path)


def _read(path: Path) -> tuple[str, str]:
    """Id and secret. Raises `InvalidValue` or `OSError`; neither message contains the file's content."""
    with path.open("rb") as file:
        text = file.read(_BYTES).decode(errors="replace").strip()
    parts = split(text)
    if parts is None:
        raise InvalidValue(f"{path} does not hold a key, mq-<12 digits>-<48 digits> in lower-case hexadecimal")
    return parts
