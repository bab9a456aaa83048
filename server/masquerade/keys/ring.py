"""The keys of a store as a running server knows them.

Knows which tokens it has verified, and notices within `NOTICE_SECONDS` what other processes add and revoke. Refuses to
keep a token: what it remembers of one is a digest under a secret of this process.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

from masquerade.errors import InvalidKey, NotReady
from masquerade.keys.key import Key, matches, split
from masquerade.keys.table import KeyTable

NOTICE_SECONDS = 0.25
_WRONG = 4096  # wrong tokens that are remembered
_UNKNOWN = "Incorrect API key provided; `masquerade keys add` makes one"


class Keyring:
    """Turns tokens into keys. Safe for several threads.

    scrypt is paid once for a token: afterwards a keyed digest of it is looked up. Whether an id exists can be told from
    the time an answer takes; ids are no secrets, and the 192 bits of a secret are compared in constant time.
    """

    def __init__(self, table: KeyTable, now: Callable[[], float] = time.time) -> None:
        self._table = table
        self._now = now
        self._pepper = secrets.token_bytes(32)
        self._keys: Mapping[str, tuple[Key, bytes]] = {}
        self._right: dict[bytes, str] = {}  # digest of a token -> id of its key
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._watch = table.connect()
        self._version = -1
        self._checked = 0.0
        self._lock = threading.Lock()  # of what is remembered
        self._hashing = threading.Lock()  # whoever guesses gets one core at most
        self._refresh()

    def __len__(self) -> int:
        """How many keys there ever were: a store whose keys are all revoked is not open again."""
        self._refresh()
        return len(self._keys)

    def recall(self, token: str) -> Key | None:
        """The key of a token, without hashing: None if it must be verified first. Raises `InvalidKey`."""
        self._refresh()
        digest = self._digest(token)
        key_id = self._right.get(digest)
        if key_id is not None:
            return self._check(key_id)
        parts = split(token)
        if parts is None or parts[0] not in self._keys or digest in self._wrong:
            raise InvalidKey(_UNKNOWN)
        return None

    def verify(self, token: str) -> Key:
        """The key of a token. Raises `InvalidKey`. May take scrypt's time, and waits for others who do."""
        with self._hashing:
            key = self.recall(token)
            if key is not None:
                return key
            parts = split(token)
            assert parts is not None
            known = self._keys.get(parts[0])
            right = known is not None and matches(parts[1], known[1])
            with self._lock:
                if right:
                    self._right[self._digest(token)] = parts[0]
                else:
                    self._wrong[self._digest(token)] = None
                    if len(self._wrong) > _WRONG:
                        self._wrong.popitem(last=False)
        if not right:
            raise InvalidKey(_UNKNOWN)
        return self._check(parts[0])

    def check(self, key_id: str) -> Key:
        """A key that was verified, as it is now. Raises `InvalidKey` if it opens nothing any more."""
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

    def _digest(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode(), key=self._pepper, digest_size=32).digest()

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
