"""A key: what its scopes include, and how its secret is made, hashed and checked."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

Scope = Literal["metrics", "chat", "build", "admin"]
SCOPES: Mapping[Scope, frozenset[Scope]] = {
    "metrics": frozenset({"metrics"}),
    "chat": frozenset({"chat"}),
    "build": frozenset({"chat", "build"}),
    "admin": frozenset({"metrics", "chat", "build", "admin"}),
}
_TOKEN = re.compile(r"mq-([0-9a-f]{12})-([0-9a-f]{48})")
_SALT_BYTES, _HASH_BYTES = 32, 32
_SCRYPT_SALT_BYTES = 16
_FEWEST_DIGITS = 8  # distinct ones of a random secret; fewer have a chance of 1 in 10^13


@dataclass(frozen=True)
class Key:
    """What is known about a key; its secret is not."""

    id: str
    name: str
    scopes: frozenset[Scope]  # as they were given; each includes what SCOPES says
    personas: tuple[str, ...]  # patterns of names, such as `npc-*`
    rpm: int | None  # requests a minute
    tpm: int | None  # tokens a minute
    created_at: float  # unix seconds, as all times here
    expires_at: float | None
    revoked_at: float | None

    def may(self, scope: Scope) -> bool:
        """Whether a scope is given, or included in one that is."""
        return any(scope in SCOPES[given] for given in self.scopes)

    def allows(self, persona: str) -> bool:
        """Whether the name of a persona, which need not exist, matches one of the patterns."""
        return any(fnmatchcase(persona, pattern) for pattern in self.personas)

    def problem(self, now: float) -> str | None:
        """Why the key opens nothing (any more), if it does not."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else None


class Minted(NamedTuple):
    """A new secret: the token is for its owner only, the hash is what is kept."""

    id: str
    token: str
    hash: bytes


def mint() -> Minted:
    """Draw a key: `mq-<id>-<secret>`, 48 and 192 random bits in hexadecimal."""
    return seal(secrets.token_hex(6), secrets.token_hex(24))


def seal(key_id: str, secret: str) -> Minted:
    """A key whose id and secret have been drawn, with the hash to keep: salt and HMAC-SHA-256.

    The salt is the HMAC's key. It is random for each key and lies in the key's row: 192 random bits cannot be guessed
    from hash and salt, and a secret file beside the table would be one more thing to lose.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    return Minted(key_id, f"mq-{key_id}-{secret}", salt + _hash(secret, salt))


def decoy() -> bytes:
    """A kept hash that no secret has, to check tokens of unknown ids against: that takes the same time."""
    return secrets.token_bytes(_SALT_BYTES + _HASH_BYTES)


def split(token: str) -> tuple[str, str] | None:
    """The id and the secret of a token; None if it has not the form of one."""
    found = _TOKEN.fullmatch(token)
    return (found[1], found[2]) if found else None


def looks_random(secret: str) -> bool:
    """Whether a secret of the right form may have been drawn at random: it repeats nothing and has enough digits."""
    return len(set(secret)) >= _FEWEST_DIGITS and secret not in (secret + secret)[1:-1]


def matches(secret: str, kept: bytes) -> bool:
    """Whether a secret has the kept hash, compared in constant time. A scrypt hash never matches."""
    return hmac.compare_digest(_hash(secret, kept[:_SALT_BYTES]), kept[_SALT_BYTES:])


def is_scrypt(kept: bytes) -> bool:
    """Whether a hash was kept by a version that used scrypt: `matches_scrypt` checks it."""
    return len(kept) == _SCRYPT_SALT_BYTES + _HASH_BYTES


def matches_scrypt(secret: str, kept: bytes) -> bool:
    """Whether a secret has the kept scrypt hash; takes tens of milliseconds and 16 MiB."""
    salt = kept[:_SCRYPT_SALT_BYTES]
    return hmac.compare_digest(_scrypt(secret, salt), kept[_SCRYPT_SALT_BYTES:])


def _hash(secret: str, salt: bytes) -> bytes:
    return hmac.digest(salt, secret.encode(), "sha256")


def _scrypt(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1, dklen=_HASH_BYTES)
