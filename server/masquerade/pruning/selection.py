"""Selects the weights to prune, given their scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROUPS: Mapping[str, str] = {"row": "within each output row", "layer": "within the whole Linear"}
STRUCTURES: Mapping[str, str] = {"weights": "single weights", "channels": "whole input channels of a Linear"}


def rank(score: Tensor, rho: float, group: str, tie: Tensor | None = None, backwards: bool = False) -> Tensor:
    """Indices of the lowest scores, lowest first: score [out, in] -> int64 [groups, count], groups as in `GROUPS`.

    `count` is rho times the group's size, rounded half to even. Equal scores are ordered by `tie`, then by index (row
    by row; from the last one on if `backwards`), so the same scores always give the same mask. The indices for a
    smaller rho are a prefix of those for a larger one.
    """
    rows = score if group == "row" else score.reshape(1, -1)
    if backwards:
        flipped = None if tie is None else tie.reshape(rows.shape).flip(1)
        return rows.shape[1] - 1 - rank(rows.flip(1), rho, "row", flipped)
    count = round(rho * rows.shape[1])
    if tie is not None:
        first = tie.reshape(rows.shape).argsort(dim=1, stable=True)
        return first.gather(1, rows.gather(1, first).argsort(dim=1, stable=True))[:, :count]
    if len(rows) > 1 or not count:
        return rows.argsort(dim=1, stable=True)[:, :count]
    threshold = rows[0].kthvalue(count).values  # only the candidates are sorted
    candidates = (rows[0] <= threshold).nonzero().squeeze(1)
    return candidates[rows[0][candidates].argsort(stable=True)][:count].unsqueeze(0)


def prune(order: Tensor, shape: torch.Size, rho: float) -> Tensor:
    """Bool [out, in], True is pruned: the share `rho` of the indices that `rank` gave for this or a larger rho."""
    pruned = torch.zeros(len(order), shape.numel() // len(order), dtype=torch.bool, device=order.device)
    pruned.scatter_(1, order[:, : round(rho * pruned.shape[1])], True)
    return pruned.view(shape)


def prune_lowest(score: Tensor, rho: float, group: str, tie: Tensor | None = None) -> Tensor:
    """The share `rho` of lowest scores: score [out, in] -> bool [out, in], True is pruned. Ties as in `rank`."""
    return prune(rank(score, rho, group, tie), score.shape, rho)
