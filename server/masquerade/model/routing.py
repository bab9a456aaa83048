"""Chooses how the masks of a batch are applied: by tables of slots on CUDA, by spans elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from masquerade.model.cuda import SlotRoute, find_entries
from masquerade.model.route import Route, Span


def make_route(spans: Iterable[Span]) -> Route:
    """The route of a batch. Rows of no span and rows at gamma 1 are the base's and cost nothing."""
    spans = [span for span in spans if span.applied.gamma < 1]
    masks = [span.applied.mask for span in spans]
    if masks and masks[0].native is None and all(find_entries(mask) is not None for mask in masks):
        return SlotRoute(spans)
    return Route(spans)
