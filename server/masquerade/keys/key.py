"""Keys and their scopes; how a secret is drawn, hashed and checked."""

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
_FEWEST_DIGITS = 8  # distinct ones in a random secret; the probability of fewer is 1 in 10^13


@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    id: str
    name: str
    scopes: frozenset[Scope]  # as granted; each includes those in SCOPES
    personas: tuple[str, ...]  # patterns of names, such as `npc-*`
    rpm: int | None  # requests a minute
    tpm: int | None  # tokens a minute
    created_at: float  # unix seconds, as all times here
    expires_at: float | None
    revoked_at: float | None

    def may(self, scope: Scope) -> bool:
        """Whether a scope is granted, or included in one that is."""
        return any(scope in SCOPES[granted] for granted in self.scopes)

    def allows(self, persona: str) -> bool:
        """Whether the name of a persona matches one of the patterns; the persona need not exist."""
        return any(fnmatchcase(persona, pattern) for pattern in self.personas)

    def problem(self, now: float) -> str | None:
        """Why the key is not valid: `revoked` or `expired`; None if it is valid."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else None


def find_scope(name: str) -> Scope | None:
    """The scope of this name, or None."""
    return next((scope for scope in SCOPES if scope == name), None)


class Minted(NamedTuple):
    """A new key: the token is shown to its owner once, the hash is stored."""

    id: str
    token: str
    hash: bytes


def mint() -> Minted:
    """A new key `mq-<id>-<secret>`, with 48 and 192 random bits in hexadecimal."""
    return seal(secrets.token_hex(6), secrets.token_hex(24))


def seal(key_id: str, secret: str) -> Minted:
    """A key of a given id and secret, with its hash: salt and HMAC-SHA-256.

    The salt is the HMAC's key, random for each key and stored with the hash: 192 random bits cannot be guessed from
    hash and salt, so a secret outside the table would only be one more thing to lose.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    return Minted(key_id, f"mq-{key_id}-{secret}", salt + _hash(secret, salt))


def decoy() -> bytes:
    """A hash that no secret has: checking a token of an unknown id against it takes the same time."""
    return secrets.token_bytes(_SALT_BYTES + _HASH_BYTES)


def split(token: str) -> tuple[str, str] | None:
    """The id and the secret of a token; None if it does not have the form of one."""
    found = _TOKEN.fullmatch(token)
    return (found[1], found[2]) if found else None


def looks_random(secret: str) -> bool:
    """Whether a secret of the right form looks random: it is not periodic and has enough distinct digits."""
    return len(set(secret)) >= _FEWEST_DIGITS and secret not in (secret + secret)[1:-1]


def matches(secret: str, stored: bytes) -> bool:
    """Whether a secret has a stored hash, compared in constant time. A scrypt hash never matches."""
    return hmac.compare_digest(_hash(secret, stored[:_SALT_BYTES]), stored[_SALT_BYTES:])


def is_scrypt(stored: bytes) -> bool:
    """Whether a stored hash is of the version that used scrypt; `matches_scrypt` checks it."""
    return len(stored) == _SCRYPT_SALT_BYTES + _HASH_BYTES


def matches_scrypt(secret: str, stored: bytes) -> bool:
    """Whether a secret has a stored scrypt hash; takes tens of milliseconds and 16 MiB."""
    salt = stored[:_SCRYPT_SALT_BYTES]
    found = hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1, dklen=_HASH_BYTES)
    return hmac.compare_digest(found, stored[_SCRYPT_SALT_BYTES:])


def _hash(secret: str, salt: bytes) -> bytes:
    return hmac.digest(salt, secret.encode(), "sha256")
