"""The base model and its masks: loading, chat templates, maskable Linears, routes, residency."""

from masquerade.model.adapter import AdapterKind, ExportedAdapter, export_adapter
from masquerade.model.chat import TemplateOptions, open_user_message, render_chat
from masquerade.model.cuda import SlotMap, Slots, SlotShape, Staging, find_entries
from masquerade.model.dequantized import Report
from masquerade.model.encoding import Room, check_bytes, encode, longest_token, too_long
from masquerade.model.families import FAMILIES
from masquerade.model.host_cache import HostCache
from masquerade.model.load import Base, load
from masquerade.model.manager import MaskManager
from masquerade.model.memory import trim_heap
from masquerade.model.native_layers import NativePlan, NativeStack, NotNative, find_parts, find_stack
from masquerade.model.placement import Stage, find_stages
from masquerade.model.residency import Residency
from masquerade.model.route import AppliedMask, ResidentMask, Route, Span
from masquerade.model.routing import make_route
from masquerade.model.short_attention import attend_short
from masquerade.model.targets import MASKABLE, SCOPES, find_layers, find_targets, layer_number
from masquerade.model.thoughts import THOUGHTS_BEGIN, THOUGHTS_END, ThoughtParser, ThoughtStart, find_thought_start
from masquerade.model.tools import ArgumentsDelta, CallStart, Dialect, ResponsePart, ToolCallParser, find_dialect
from masquerade.model.verified_store import VerifiedStore

__all__ = [
    "FAMILIES",
    "MASKABLE",
    "SCOPES",
    "THOUGHTS_BEGIN",
    "THOUGHTS_END",
    "AdapterKind",
    "AppliedMask",
    "ArgumentsDelta",
    "Base",
    "CallStart",
    "Dialect",
    "ExportedAdapter",
    "HostCache",
    "MaskManager",
    "NativePlan",
    "NativeStack",
    "NotNative",
    "Report",
    "Residency",
    "ResidentMask",
    "ResponsePart",
    "Room",
    "Route",
    "SlotMap",
    "SlotShape",
    "Slots",
    "Span",
    "Stage",
    "Staging",
    "TemplateOptions",
    "ThoughtParser",
    "ThoughtStart",
    "ToolCallParser",
    "VerifiedStore",
    "attend_short",
    "check_bytes",
    "encode",
    "export_adapter",
    "find_dialect",
    "find_entries",
    "find_layers",
    "find_parts",
    "find_stack",
    "find_stages",
    "find_targets",
    "find_thought_start",
    "layer_number",
    "load",
    "longest_token",
    "make_route",
    "open_user_message",
    "render_chat",
    "too_long",
    "trim_heap",
]
