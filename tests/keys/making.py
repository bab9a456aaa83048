"""Makes keys, without the command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from masquerade.keys import Key, KeyTable, mint


def make_key(store: Path, *scopes: str, **changes: Any) -> tuple[str, Key]:
    """A key of a store; the token and what is known about it."""
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
    KeyTable(store).add(key, minted.hash)
    return minted.token, key


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {token}"}
