"""API keys of a store: secrets, scopes, persona patterns, rate limits, and the audit log."""

from masquerade.keys.audit import Audit
from masquerade.keys.key import SCOPES, Key, Scope, mint
from masquerade.keys.rates import Rates

__all__ = [
    "SCOPES",
    "Audit",
    "Key",
    "Rates",
    "Scope",
    "mint",
]
