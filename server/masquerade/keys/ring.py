"""The keys of a store as a running server knows them, read again within `NOTICE_SECONDS` of a change."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from masquerade.errors import InvalidKey, NotReady
from masquerade.keys.key import Key, decoy, is_scrypt, matches, matches_scrypt, seal, split
from masquerade.keys.table import KeyTable

NOTICE_SECONDS = 0.25
_UNKNOWN = "Incorrect API key provided; `masquerade keys add` makes one"


class Keyring:
    """Turns tokens into keys. Safe for several threads.

    Each token costs one HMAC and one comparison in constant time, whether or not its id is known. The exception is a
    key whose hash is still scrypt's: its first use costs scrypt's time once, on the caller's thread.
    """

    def __init__(self, table: KeyTable, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._now = now
        self._decoy = decoy()
        self._keys: Mapping[str, tuple[Key, bytes]] = {}
        self._watch = table.database.connect()
        self._version = -1
        self._checked = 0.0
        self._lock = threading.Lock()  # of what was read
        self._refresh()

    def __len__(self) -> int:
        """How many keys there ever were: a store whose keys are all revoked is not open again."""
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
        kept = known[1] if known else self._decoy
        if matches(secret, kept):
            return self._check(key_id)
        if is_scrypt(kept):
            return None
        raise InvalidKey(_UNKNOWN)

    def find_scrypt(self, token: str) -> Key:
        """The same for every token, with scrypt where it is needed. A right one is kept by a fast hash from then on."""
        key = self.find(token)
        if key is not None:
            return key
        parts = split(token)
        assert parts is not None
        key_id, secret = parts
        kept = self._keys[key_id][1]
        if not matches_scrypt(secret, kept):
            raise InvalidKey(_UNKNOWN)
        renewed = seal(key_id, secret).hash
        with suppress(NotReady):  # it cannot be written: the next server tries again
            self._table.rehash(key_id, kept, renewed)
        with self._lock:
            self._keys = {**self._keys, key_id: (self._keys[key_id][0], renewed)}
        return self._check(key_id)

    def check(self, key_id: str) -> Key:
        """A key that was found, as it is now. Raises `InvalidKey` if it opens nothing any more."""
        self._refresh()
        return self._check(key_id)

    def close(self) -> None:
        """Let go of the table."""
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
        if now - self._checked < NOTICE_SECONDS and self._version >= 0:
            return
        with self._lock:
            try:
                version: int = self._watch.execute("pragma data_version").fetchone()[0]
            except sqlite3.Error as error:
                raise NotReady(f"the keys cannot be read: {error}") from error
            if version != self._version:
                self._keys = {key.id: (key, kept) for key, kept in self._table.all().items()}
                self._version = version
            self._checked = now
