"""Where in the model a mask acts: differing weights by layer, and similarity of representations by linear CKA.

The paper's section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskstore import Mask, diff
from maskstore.plot import encode as encode_png
from masquerade.evaluate.dataset import Encoded, batches
from masquerade.evaluate.metrics import find_spans
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_layers, make_route

POSITIONS = 4096  # most positions that CKA is computed over
_CELL = 24  # pixels


def analyse(
    base: Base, manager: MaskManager, mask: Mask, opposite: Mask | None, texts: Sequence[Encoded]
) -> dict[str, Any]:
    """Share of weights that differ between a mask and its opposite, in all, by layer and by part, and CKA by layer.

    `cka` compares the masked model's layer outputs with the base's, and with those under the opposite mask, on the same
    positions; both masks are at their own gammas and in their own phases.
    """

    def treat(one: Mask) -> Treatment:
        return Treatment(AppliedMask(manager.fit(one), one.info.gamma), one.info.phase)

    masked = _states(base, treat(mask), texts)
    found: dict[str, Any] = {"cka": {"base": _compare(masked, _states(base, UNTREATED, texts))}}
    if opposite is not None:
        other = _states(base, treat(opposite), texts)
        found["cka"]["opposite"] = _compare(masked, other)
        overlap = diff(mask, opposite)
        found["differing"] = {
            "total": round(overlap.total.differing, 6),
            "parts": {name: round(one.differing, 6) for name, one in overlap.parts.items()},
            "layers": {name: round(one.differing, 6) for name, one in overlap.layers.items()},
        }
    return found


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of [n, p] and [n, q] (Kornblith et al. 2019), in [0, 1]; 1 is equal up to
    rotation and scale."""
    x, y = (one.double() - one.double().mean(0) for one in (a, b))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def draw(analysis: dict[str, Any]) -> bytes:
    """A PNG with a column per layer and a row per comparison, from dark (1 - CKA = 0) to bright (the largest)."""
    rows = np.array([[1 - value for value in values] for values in analysis["cka"].values()])
    levels = rows / max(float(rows.max()), 1e-12)
    shades = np.stack([levels * 253, levels * 231, 84 - levels * 47], axis=-1).astype(np.uint8)
    return encode_png(shades.repeat(_CELL, 0).repeat(_CELL, 1))


def _compare(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    return [round(cka(x, y), 6) for x, y in zip(a, b, strict=True)]


@torch.no_grad()
def _states(base: Base, treatment: Treatment, texts: Sequence[Encoded]) -> list[Tensor]:
    """Every layer's output at the positions that predict responses, [positions, hidden] each."""
    layers = find_layers(base.model)
    kept: list[list[Tensor]] = [[] for _ in layers]
    positions = 0
    for batch in batches(texts, base.device):
        spans = find_spans(batch, texts, treatment)

        def keep(number: int, counted: Tensor = batch.predicts) -> Any:
            def hook(_: Any, __: Any, output: Any) -> None:
                kept[number].append((output[0] if isinstance(output, tuple) else output)[counted].float().cpu())

            return hook

        handles = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(layers)]
        try:
            base.model(input_ids=batch.ids, use_cache=False, route=make_route(spans))
        finally:
            for handle in handles:
                handle.remove()
        positions += int(batch.predicts.sum())
        if positions >= POSITIONS:
            break
    return [torch.cat(states)[:POSITIONS] for states in kept]
