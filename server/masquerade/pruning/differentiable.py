"""What a decoder layer of a known structure does between its Linears, by kernels that have gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from masquerade.kernels import LayerParts, attend, multiply_gate, normalize, rotate, serves_rows
from masquerade.model import find_parts

MOST_PRODUCTS = 1024 * 1024  # of queries and keys; beyond, the shares of all at once take too much memory
Replacements = tuple[Sequence[nn.Module], Sequence[Callable[..., Any]]]


def find_replacements(layer: Any) -> Replacements:
    """Modules of a decoder layer, and functions that compute the same; none if its structure is not known.

    Linears are called as modules. Values are rounded as transformers rounds them, but for sums.
    """
    parts = find_parts(layer)
    weights = () if parts is None else [norm.weight for norm in parts.norms if norm is not None]
    if parts is None or not all(serves_rows(weight) for weight in weights):  # type: ignore[arg-type]
        return (), ()
    norms = [norm for norm in parts.norms[:2] if norm is not None]
    functions: list[Callable[..., Any]] = [partial(_normalize, norm, parts) for norm in norms]
    functions += [partial(_run_mlp, layer.mlp), partial(_attend, layer.self_attn, parts)]
    return [*norms, layer.mlp, layer.self_attn], functions


def _normalize(norm: Any, parts: LayerParts, x: Tensor) -> Tensor:
    return normalize(x, norm.weight, parts.eps)


def _run_mlp(mlp: Any, x: Tensor) -> Tensor:
    found: Tensor = mlp.down_proj(multiply_gate(mlp.gate_proj(x), mlp.up_proj(x)))
    return found


def _supports(length: int, mask: Tensor | None) -> bool:
    """Whether `_attend` attends with a mask of so many queries; transformers has none where all is seen that may be."""
    positions = length if mask is None else mask.shape[-1]
    return length * positions <= MOST_PRODUCTS and (mask is None or mask.dtype is torch.bool)


def _attend(
    attention: Any,
    parts: LayerParts,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention module's forward, of transformers."""
    rows, length, _ = hidden_states.shape
    if not _supports(length, attention_mask):
        arguments = hidden_states, position_embeddings, attention_mask, past_key_values
        found: tuple[Tensor, None] = type(attention).forward(attention, *arguments, **kwargs)
        return found
    size, norms = parts.head_size, parts.norms[2:]

    def place(linear: nn.Linear, norm: Any) -> Tensor:
        heads: Tensor = linear(hidden_states).view(rows, length, -1, size)
        if norm is not None and not parts.norms_rotated:
            heads = _normalize(norm, parts, heads)
        if parts.rotates:
            heads = rotate(heads, *position_embeddings)
        if norm is not None and parts.norms_rotated:
            heads = _normalize(norm, parts, heads)
        return heads.transpose(1, 2)

    q, keys = place(attention.q_proj, norms[0]), place(attention.k_proj, norms[1])
    values = attention.v_proj(hidden_states).view(rows, length, -1, size).transpose(1, 2)
    if past_key_values is not None:
        keys, values = past_key_values.update(keys, values, attention.layer_idx)
    positions = keys.shape[2]
    if attention_mask is None:
        seen = torch.ones(length, positions, dtype=torch.bool).tril(positions - length)
    else:
        seen = attention_mask[:, 0]
    attended = attend(q, keys, values, seen.expand(rows, length, positions), parts.scale)
    return attention.o_proj(attended.transpose(1, 2).flatten(2)), None
