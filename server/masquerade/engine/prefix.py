"""Prefix hashes: equal prefixes are computed once, and positions under different masks never share a block.

The keys and values of a position depend on every token up to it and on the mask of each of these positions. The hash of
a block is therefore 128 bits over the hash of the previous block, the masks of the block's positions, and its tokens.
The last block of a prompt is seldom full; its positions get a hash of their own, the partial hash.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from masquerade.model import AppliedMask

BLOCK_SIZE = 16  # positions in a block
_BYTES = 16  # 128 bits: after a collision, one prompt would read the keys and values of another


@dataclass(frozen=True)
class Salts:
    """Hash salts for a base: one for its unmasked positions, and one for each mask at each gamma."""

    fingerprint: str  # of the base

    def of(self, applied: AppliedMask | None) -> bytes:
        """The salt of positions under a mask. At gamma 1 they are equal to the base's and share its salt."""
        if applied is None or applied.gamma == 1:
            return _hash(b"masquerade kv 1 base", self.fingerprint.encode())
        gamma = struct.pack("<d", applied.gamma)
        return _hash(b"masquerade kv 1 mask", self.fingerprint.encode(), applied.mask.digest.encode(), gamma)


class PrefixHashes:
    """The hashes of one request's blocks. Positions from `first_masked` on are under the mask."""

    def __init__(self, base_salt: bytes, mask_salt: bytes, first_masked: int) -> None:
        self._base_salt, self._mask_salt, self._first_masked = base_salt, mask_salt, first_masked
        self._hashes: list[bytes] = []

    def full(self, ids: Sequence[int], count: int) -> list[bytes]:
        """The hashes of the first `count` blocks of these tokens. Hashes are kept: between calls, tokens may only be
        appended.
        """
        for block in range(len(self._hashes), count):
            self._hashes.append(self._hash_positions(ids, block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE))
        return self._hashes[:count]

    def partial(self, ids: Sequence[int], stop: int) -> bytes:
        """The hash of the positions before `stop` that are in the same block as `stop`."""
        self.full(ids, stop // BLOCK_SIZE)
        return self._hash_positions(ids, stop // BLOCK_SIZE * BLOCK_SIZE, stop)

    def _hash_positions(self, ids: Sequence[int], start: int, stop: int) -> bytes:
        unmasked = min(max(self._first_masked - start, 0), stop - start)
        salt, mixed = (self._base_salt, 0) if unmasked == stop - start else (self._mask_salt, unmasked)
        parent = self._hashes[start // BLOCK_SIZE - 1] if start else b""
        tokens = struct.pack(f"<{stop - start}I", *ids[start:stop])
        return _hash(parent, salt, bytes([mixed]), tokens)


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=_BYTES)
    for part in parts:
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return digest.digest()
