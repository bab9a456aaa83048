"""Bytes of a model's weights, of its KV cache and of a persona's mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from maskstore import Bitmap, Sparse
from maskstore.target import is_thin
from masquerade.engine import kv_cache
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.kernels import BACKENDS, choose, footprint
from masquerade.kernels.quantised import FORMS
from masquerade.model.quantized import A8, QUANTIZATIONS, measure_weight
from masquerade.plan.outline import Outline

RHOS = (0.0001, 0.0008, 0.003, 0.01, 0.1)
PADDING = 2  # blocks of a KV cache that hold no request


@dataclass(frozen=True)
class PersonaFootprint:
    """Bytes of a mask that prunes the share `rho` of each maskable Linear, on the device."""

    rho: float
    pruned: int
    nbytes: int  # as it is kept: each Linear in the fastest form
    listed: int  # if every Linear had a list of its pruned weights
    bitmaps: int  # if every Linear had one bit a weight
    forms: tuple[str, ...]  # the backends that keep it


def measure_weights(outline: Outline, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of the weights in `dtype`, those of the maskable Linears quantised.

    Raises `ValueError` if a Linear cannot be quantised so.
    """
    total = outline.parameters * dtype.itemsize
    if quantization == A8:
        if not outline.saved:
            raise ValueError(f"only weights of {', '.join(FORMS)} in a GGUF file, on a CPU in bfloat16, stay in blocks")
        return total - outline.saved
    for linear in outline.linears.values() if quantization else ():
        total += measure_weight(linear, str(quantization)) - linear.weight.numel() * dtype.itemsize
    return total


def measure_served(outline: Outline, quantization: str | None = None) -> int:
    """Bytes of the weights as a server has them: those of a GGUF file may stay in its blocks.

    Raises `ValueError` as `measure_weights` does.
    """
    kept = outline.saved if outline.keeps and not quantization else 0
    return measure_weights(outline, outline.dtype, quantization) - kept


def count_blocks(tokens: int) -> int:
    """KV cache blocks of a request of so many tokens."""
    return -(-tokens // BLOCK_SIZE)


def measure_block(outline: Outline) -> int:
    """Bytes of a block, of keys and values, over all layers; a sliding window does not make it smaller."""
    return measure_token(outline) * BLOCK_SIZE


def measure_token(outline: Outline) -> int:
    """Bytes of a token's keys and values over all layers."""
    return kv_cache.bytes_per_position(outline.config, outline.dtype)


def measure_pool(outline: Outline, max_running: int, cache_bytes: int) -> tuple[int, int]:
    """The blocks for requests that an engine with these limits has, and the bytes of its KV cache."""
    blocks = kv_cache.count_blocks(measure_block(outline), outline.context, max_running, cache_bytes)
    return blocks, (blocks + PADDING) * measure_block(outline)


def find_window(config: Any) -> tuple[int, int] | None:
    """The tokens of a sliding window and the number of layers that have one; None if none has."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    layers = config.num_hidden_layers if kinds is None else list(kinds).count("sliding_attention")
    return (int(window), int(layers)) if layers else None


def measure_persona(outline: Outline, rho: float, quantization: str | None = None) -> PersonaFootprint:
    """The footprint of a mask that `residency` would count, in the encoding that its file would have."""
    device = None if quantization in QUANTIZATIONS else outline.device  # torch corrects those, as it does those on meta
    pruned = nbytes = listed = bitmaps = 0
    forms: Counter[str] = Counter()
    for linear, count in _group(outline.linears.values()):
        out, columns = linear.out_features, linear.in_features
        of_one = round(rho * out * columns)
        kind = Sparse.kind if is_thin(out, columns, of_one) else Bitmap.kind
        forms[choose(linear, kind, of_one, device)] += count
        pruned += count * of_one
        nbytes += count * footprint(linear, kind, of_one, device)
        listed += count * BACKENDS[choose(linear, Sparse.kind, 0, device)].footprint(linear, of_one)
        bitmaps += count * BACKENDS[choose(linear, Bitmap.kind, 0, device)].footprint(linear, of_one)
    return PersonaFootprint(rho, pruned, nbytes, listed, bitmaps, tuple(sorted(forms)))


def _group(linears: Iterable[nn.Linear]) -> list[tuple[nn.Linear, int]]:
    """One Linear of each shape, and their number."""
    found: dict[tuple[int, int], list[nn.Linear]] = {}
    for linear in linears:
        found.setdefault((linear.out_features, linear.in_features), []).append(linear)
    return [(same[0], len(same)) for same in found.values()]
