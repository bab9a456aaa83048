"""Names for what a page holds, so that equal beginnings are computed once and different personas never meet.

Knows tokens, salts and the chain of hashes. Refuses to know pages and requests.

Keys and values of a position depend on every token before it and on what every one of those positions wore. So a page's
key is a 128-bit hash of the key of the page before, of what its own positions wear, and of its tokens. The end of a
prompt seldom fills a page; its positions have a key of their own, the tail.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from masquerade.model import AppliedMask

BLOCK_SIZE = 16  # positions a page
_BYTES = 16  # 128 bits: a collision would serve one prompt's memory to another


@dataclass(frozen=True)
class Salts:
    """What distinguishes pages of equal tokens: the base, and the mask at its strength."""

    fingerprint: str  # of the base

    def of(self, applied: AppliedMask | None) -> bytes:
        """The salt of positions that wear this; gamma 1 is the base and shares its salt."""
        if applied is None or applied.gamma == 1:
            return _hash(b"masquerade kv 1 base", self.fingerprint.encode())
        gamma = struct.pack("<d", applied.gamma)
        return _hash(b"masquerade kv 1 mask", self.fingerprint.encode(), applied.mask.digest.encode(), gamma)


class PrefixHashes:
    """The keys of one request's full pages, in order. `first` is the first position that wears the mask."""

    def __init__(self, bare: bytes, worn: bytes, first: int) -> None:
        self._bare, self._worn, self._first = bare, worn, first
        self._keys: list[bytes] = []

    def keys(self, ids: Sequence[int], count: int) -> list[bytes]:
        """The keys of the first `count` pages of these tokens; tokens given before must not have changed."""
        for page in range(len(self._keys), count):
            self._keys.append(self._name(ids, page * BLOCK_SIZE, (page + 1) * BLOCK_SIZE))
        return self._keys[:count]

    def tail(self, ids: Sequence[int], stop: int) -> bytes:
        """The key of the positions before `stop` in the page that holds it."""
        start = stop // BLOCK_SIZE * BLOCK_SIZE
        self.keys(ids, stop // BLOCK_SIZE)
        return self._name(ids, start, stop)

    def _name(self, ids: Sequence[int], start: int, stop: int) -> bytes:
        bare = min(max(self._first - start, 0), stop - start)  # of these positions, how many wear nothing
        salt, mixed = (self._bare, 0) if bare == stop - start else (self._worn, bare)
        parent = self._keys[start // BLOCK_SIZE - 1] if start else b""
        tokens = struct.pack(f"<{stop - start}I", *ids[start:stop])
        return _hash(parent, salt, bytes([mixed]), tokens)


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=_BYTES)
    for part in parts:
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return digest.digest()
