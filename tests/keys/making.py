"""Makes keys, without the command."""

from __future__ import annotations

import hashlib
import secrets
import time
from pathlib import Path
from typing import Any

from masquerade.keys import Key, mint
from masquerade.keys.table import KeyTable


def make_key(store: Path | KeyTable, *scopes: str, scrypt: bool = False, **changes: Any) -> tuple[str, Key]:
    """A key of a store, hashed as of old if asked for; the token and what is known about it."""
    minted = mint()
    told: dict[str, Any] = {
        "name": "",
        "scopes": frozenset(scopes),
        "personas": ("*",),
        "rpm": None,
        "tpm": None,
        "created_at": time.time(),
        "expires_at": None,
        "revoked_at": None,
    }
    key = Key(minted.id, **(told | changes))
    table = store if isinstance(store, KeyTable) else KeyTable(store)
    table.add(key, hash_with_scrypt(minted.token) if scrypt else minted.hash)
    return minted.token, key


def hash_with_scrypt(token: str) -> bytes:
    """What the first version kept of a token."""
    salt = secrets.token_bytes(16)
    return salt + hashlib.scrypt(token.rpartition("-")[2].encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {token}"}
