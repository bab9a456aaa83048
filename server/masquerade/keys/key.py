"""A key and its secret.

Knows what a scope includes and how a secret is made and hashed. Refuses to know where keys are kept.
"""

from __future__ import annotations

import hashlib
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
_SALT_BYTES = 16


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
    """A key whose id and secret have been drawn; takes scrypt's time."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return Minted(key_id, f"mq-{key_id}-{secret}", salt + _scrypt(secret, salt))


def split(token: str) -> tuple[str, str] | None:
    """The id and the secret of a token; None if it has not the form of one."""
    found = _TOKEN.fullmatch(token)
    return (found[1], found[2]) if found else None


def matches(secret: str, kept: bytes) -> bool:
    """Whether a secret has the kept hash; takes scrypt's time, tens of milliseconds, and 16 MiB."""
    salt = kept[:_SALT_BYTES]
    return secrets.compare_digest(_scrypt(secret, salt), kept[_SALT_BYTES:])


def _scrypt(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)
