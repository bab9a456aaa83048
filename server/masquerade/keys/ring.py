"""The keys of a store in memory, read again within `REFRESH_SECONDS` of a change."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from masquerade.errors import InvalidKey, NotReady
from masquerade.keys.key import Key, decoy, is_scrypt, matches, matches_scrypt, seal, split
from masquerade.keys.table import KeyTable

REFRESH_SECONDS = 0.25
_UNKNOWN = "Incorrect API key provided; `masquerade keys add` makes one"


class Keyring:
    """Finds the key of a token. Safe for several threads.

    Each token costs one HMAC and one comparison in constant time, also if its id is unknown. The exception is a key
    with a scrypt hash: its first use costs the time of scrypt, on the caller's thread.
    """

    def __init__(self, table: KeyTable, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._now = now
        self._decoy = decoy()
        self._keys: Mapping[str, tuple[Key, bytes]] = {}
        self._watch = table.database.connect()
        self._version = -1
        self._checked = 0.0
        self._lock = threading.Lock()  # guards _keys and _version
        self._refresh()

    def __len__(self) -> int:
        """Number of keys, including revoked ones: a store whose keys are all revoked is not open to everybody."""
        self._refresh()
        return len(self._keys)

    def find(self, token: str) -> Key | None:
        """The key of a token; None if its id is known and only `find_scrypt` can tell. Raises `InvalidKey`."""
        self._refresh()
        parts = split(token)
        if parts is None:
            raise InvalidKey(_UNKNOWN)
        key_id, secret = parts
        known = self._keys.get(key_id)
        stored = known[1] if known else self._decoy
        if matches(secret, stored):
            return self._check(key_id)
        if is_scrypt(stored):
            return None
        raise InvalidKey(_UNKNOWN)

    def find_scrypt(self, token: str) -> Key:
        """As `find`, for every token. A key that is found by scrypt gets a fast hash."""
        key = self.find(token)
        if key is not None:
            return key
        parts = split(token)
        assert parts is not None
        key_id, secret = parts
        stored = self._keys[key_id][1]
        if not matches_scrypt(secret, stored):
            raise InvalidKey(_UNKNOWN)
        renewed = seal(key_id, secret).hash
        with suppress(NotReady):  # the table cannot be written: the next server tries again
            self._table.rehash(key_id, stored, renewed)
        with self._lock:
            self._keys = {**self._keys, key_id: (self._keys[key_id][0], renewed)}
        return self._check(key_id)

    def check(self, key_id: str) -> Key:
        """The present state of a key that was found. Raises `InvalidKey` if it is no longer valid."""
        self._refresh()
        return self._check(key_id)

    def close(self) -> None:
        """Close the table."""
        self._watch.close()

    def _check(self, key_id: str) -> Key:
        if key_id not in self._keys:
            raise InvalidKey(_UNKNOWN)
        key = self._keys[key_id][0]
        if problem := key.problem(self._now()):
            raise InvalidKey(f"Incorrect API key provided: it is {problem}")
        return key

    def _refresh(self) -> None:
        """Read the table again if another connection changed it. Raises `NotReady` if it cannot be read."""
        now = time.monotonic()
        if now - self._checked < REFRESH_SECONDS and self._version >= 0:
            return
        with self._lock:
            try:
                version: int = self._watch.execute("pragma data_version").fetchone()[0]
            except sqlite3.Error as error:
                raise NotReady(f"the keys cannot be read: {error}") from error
            if version != self._version:
                self._keys = {key.id: (key, stored) for key, stored in self._table.all().items()}
                self._version = version
            self._checked = now
