"""Attention of short sequences in half precision on a CPU, registered with transformers as an attention implementation.

It is made of matrix products. Up to 48 queries a row, torch's fused kernel takes 1.6 to 2.4 times as long, and with the
backward pass five times (`benchmarks.costs`). On a processor that does not multiply bfloat16, both are slower than the
fused kernel in float32, which is used there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from masquerade.kernels import widen

NAME = "masquerade-short"
FUSED = "sdpa"  # what it stands in for
MOST_PRODUCTS = 256 * 256  # of queries and keys; beyond, the fused kernel is faster
HALF = (torch.bfloat16, torch.float16)


def attend_short(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention with the arguments and results of the implementation `sdpa` of transformers, which it calls for what is
    not short or not in half precision on a CPU.
    """
    if widen(q) is not q:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        wide = attend_short(module, widen(q), widen(k), widen(v), attention_mask, **kw)[0]
        return wide.to(q.dtype), None
    products = q.shape[2] * k.shape[2]
    if q.device.type != "cpu" or q.dtype not in HALF or products > MOST_PRODUCTS or kw.get("position_bias") is not None:
        outcome: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[FUSED](module, q, k, v, attention_mask, **kw)
        return outcome
    rows, heads, queries, size = q.shape
    groups, keys = rows * k.shape[1], k.shape[2]  # a group is the query heads that share keys and values
    scale = kw.get("scaling")
    scaled = q * (size**-0.5 if scale is None else scale)  # before the product, which half precision might not hold
    scores = scaled.reshape(groups, -1, size) @ k.reshape(groups, keys, size).transpose(1, 2)
    scores = scores.view(rows, heads, queries, keys)
    causal = kw.get("is_causal")
    if attention_mask is None and queries > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        attention_mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # finite, so that padding is not NaN
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).view(groups, -1, keys)
    out = (weights @ v.reshape(groups, keys, -1)).view(rows, heads, queries, -1)
    return out.transpose(1, 2).contiguous(), None


def use_short_attention(model: Any) -> None:
    """Let a model that has torch's fused attention call `attend_short` instead."""
    if model.config._attn_implementation == FUSED:
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend_short)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[FUSED])
