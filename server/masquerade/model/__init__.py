"""A base model that can wear masks: loading, chat template, targets, routes, hooks, residency.

Knows torch modules. Refuses to know about requests, HTTP and building.
"""

from masquerade.model.chat import render_chat
from masquerade.model.dequantized import Report
from masquerade.model.encoding import Room, check_bytes, check_tokens, encode, longest_token, too_long
from masquerade.model.host_cache import HostCache
from masquerade.model.load import Base, load
from masquerade.model.manager import MaskManager
from masquerade.model.memory import hand_back
from masquerade.model.residency import Residency
from masquerade.model.route import AppliedMask, ResidentMask, Route, Span
from masquerade.model.slots import SlotMap, Slots, SlotShape, find_entries, make_route
from masquerade.model.staging import Staging
from masquerade.model.targets import SCOPES, find_targets
from masquerade.model.tools import Argued, Dialect, Opened, Part, Reader, find_dialect
from masquerade.model.verified_store import VerifiedStore

__all__ = [
    "SCOPES",
    "AppliedMask",
    "Argued",
    "Base",
    "Dialect",
    "HostCache",
    "MaskManager",
    "Opened",
    "Part",
    "Reader",
    "Report",
    "Residency",
    "ResidentMask",
    "Room",
    "Route",
    "SlotMap",
    "SlotShape",
    "Slots",
    "Span",
    "Staging",
    "VerifiedStore",
    "check_bytes",
    "check_tokens",
    "encode",
    "find_dialect",
    "find_entries",
    "find_targets",
    "hand_back",
    "load",
    "longest_token",
    "make_route",
    "render_chat",
    "too_long",
]
