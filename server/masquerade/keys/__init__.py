"""Keys: who may do what, as which persona, how often; and what was done.

Knows secrets, scopes, rates and the audit log, below a store's folder. Refuses to know HTTP.
"""

from masquerade.keys.audit import Audit
from masquerade.keys.key import (
    SCOPES,
    Key,
    Scope,
    is_scrypt,
    looks_random,
    matches,
    matches_scrypt,
    mint,
    seal,
    split,
)
from masquerade.keys.rates import Rates
from masquerade.keys.ring import Keyring
from masquerade.keys.table import KeyTable

__all__ = [
    "SCOPES",
    "Audit",
    "Key",
    "KeyTable",
    "Keyring",
    "Rates",
    "Scope",
    "is_scrypt",
    "looks_random",
    "matches",
    "matches_scrypt",
    "mint",
    "seal",
    "split",
]
