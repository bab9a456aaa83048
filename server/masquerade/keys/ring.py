"""The keys of a store in memory, read again within `REFRESH_SECONDS` of a change."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress

from masquerade.database.tables import KEY
from masquerade.errors import InvalidKey, NotReady
from masquerade.keys.key import Key, decoy, is_scrypt, matches, matches_scrypt, seal, split
from masquerade.keys.table import KeyTable

_log = logging.getLogger(__name__)
REFRESH_SECONDS = 0.25
STALE_SECONDS = 2.0  # without a look at a database, after which its keys are not trusted
_UNKNOWN = "Incorrect API key provided; `masquerade keys add` makes one"


class Keyring:
    """Finds the key of a token. Safe for several threads.

    Each token costs one HMAC and one comparison in constant time, also if its id is unknown. The exception is a key
    with a scrypt hash: its first use costs the time of scrypt, on the caller's thread.

    A file is looked at by the thread that finds a key, which takes microseconds. A database may not answer: there a
    thread of the ring's own looks, and after `STALE_SECONDS` without an answer no key is found.
    """

    def __init__(self, table: KeyTable, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._now = now
        self._decoy = decoy()
        self._keys: Mapping[str, tuple[Key, bytes]] = {}
        self._watch = table.group.watch(KEY)
        self._version: Hashable = None
        self._checked = 0.0
        self._lock = threading.Lock()  # guards _keys and _version
        self._closed = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._keep_looking, name="keys", daemon=True)
        if table.group.shared:
            self._thread.start()

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
        """Stop looking at the table."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
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
        age = time.monotonic() - self._checked
        if self._thread.ident is None:
            if age >= REFRESH_SECONDS:
                self._look()
        elif age >= STALE_SECONDS:
            raise NotReady("the keys cannot be read, because the server's database does not answer; try again")

    def _look(self) -> None:
        began = time.monotonic()
        with self._lock:
            version = self._watch.look()
            if version != self._version:
                self._keys = {key.id: (key, stored) for key, stored in self._table.all().items()}
                self._version = version
            self._checked = began

    def _keep_looking(self) -> None:
        while not self._closed.wait(REFRESH_SECONDS):
            try:
                self._look()
            except NotReady:  # the database has logged it
                continue
            except Exception:
                _log.exception("the keys cannot be read; trying again")
