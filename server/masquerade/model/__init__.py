"""A base model that can wear masks: loading, chat template, targets, routes, hooks, residency.

Knows torch modules. Refuses to know about requests, HTTP and building.
"""

from masquerade.model.chat import render_chat
from masquerade.model.host import Host
from masquerade.model.load import Base, load
from masquerade.model.manager import MaskManager
from masquerade.model.memory import hand_back
from masquerade.model.residency import Residency
from masquerade.model.route import Route, Span, Wear, WornMask
from masquerade.model.shelf import Shelf
from masquerade.model.slots import Frame, Outfits, Slots, enter, route
from masquerade.model.staging import Staging
from masquerade.model.targets import SCOPES, find_targets
from masquerade.model.tools import Argued, Dialect, Opened, Part, Reader, find_dialect

__all__ = [
    "SCOPES",
    "Argued",
    "Base",
    "Dialect",
    "Frame",
    "Host",
    "MaskManager",
    "Opened",
    "Outfits",
    "Part",
    "Reader",
    "Residency",
    "Route",
    "Shelf",
    "Slots",
    "Span",
    "Staging",
    "Wear",
    "WornMask",
    "enter",
    "find_dialect",
    "find_targets",
    "hand_back",
    "load",
    "render_chat",
    "route",
]
