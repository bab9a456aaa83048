"""Attention over the paged cache, registered with transformers as an attention implementation.

The cache and the step's plan are arguments of each call. A model can therefore serve several engines, and is an
ordinary model when it is called without a plan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from masquerade.engine.kv_cache import KVCache
from masquerade.errors import UnusableModel
from masquerade.kernels import PagedStep
from masquerade.model import attend_short

_log = logging.getLogger(__name__)

NAME = "masquerade"
NO_MASK = torch.empty(0, 0, 0, 0)  # the plan has the masks; transformers passes a four-dimensional mask through
_UNSUPPORTED = ("position_bias",)  # it changes the scores, so ignoring it would give wrong answers


@dataclass(frozen=True)
class Scores:
    """How scores are computed from the products of queries and keys."""

    scale: float
    softcap: float | None = None  # score = softcap * tanh(score / softcap): Gemma 2
    sinks: Tensor | None = None  # [heads]: a score for a position without a value: gpt-oss
    sliding_window: int | None = None  # positions that a query attends to, its own included
    chunk: int | None = None  # a query attends to its own chunk of so many positions: Llama 4

    def fit_sdpa(self, positions: int) -> bool:
        """Whether, up to so many positions, this is scaled dot-product attention."""
        bounded = any(bound is not None and positions > bound for bound in (self.sliding_window, self.chunk))
        return self.softcap is None and self.sinks is None and not bounded

    @property
    def feature(self) -> str:
        """What scaled dot-product attention does not have, in words."""
        bound = "a sliding window" if self.chunk is None else "chunks"
        return "soft caps" if self.softcap is not None else "sinks" if self.sinks is not None else bound


@dataclass(frozen=True)
class AttentionCall:
    """The attention of one layer in one step."""

    layer: int  # of the cache
    scores: Scores
    cache: KVCache
    keys: Tensor  # of the step's rows: [rows, kv heads, head size]
    values: Tensor


class RowGroup(Protocol):
    """Consecutive rows of a step that one kernel call computes."""

    @property
    def start(self) -> int:
        """The first row."""

    @property
    def stop(self) -> int:
        """The row after the last one."""

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """The attention of q [rows, heads, head size], the queries of these rows; in the shape and dtype of q."""


@dataclass(frozen=True)
class DecodeRows:
    """Rows [start, stop) are one position each, of requests of similar length.

    Grouped query heads are packed into the query axis, so keys and values are never repeated.
    """

    start: int
    stop: int
    head_blocks: Tensor  # every row's context: int64 [rows * kv heads * blocks of the longest]
    mask: Tensor  # 0 for the row's positions, minus infinity for padding: [rows, 1, 1, positions of these blocks]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `RowGroup`."""
        (rows, heads, size), scores = q.shape, call.scores
        k, v = call.cache.read(call.layer, self.head_blocks, rows)
        if not scores.fit_sdpa(k.shape[2]):
            return eager_attention(q.unsqueeze(2), k, v, self.mask == 0, scores).squeeze(2)
        grouped = q.reshape(rows, call.cache.kv_heads, -1, size)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask, scale=scores.scale)
        return out.reshape(rows, heads, size)


@dataclass(frozen=True)
class PrefillRows:
    """Rows [start, stop) are consecutive positions of one request.

    `head_blocks` and `mask` are None if the first of them is position 0: the rows then attend to each other only.
    """

    start: int
    stop: int
    head_blocks: Tensor | None  # all positions up to the last row: int64 [kv heads * blocks]
    mask: Tensor | None  # 0 or minus infinity: [stop - start, positions of these blocks]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `RowGroup`."""
        if self.head_blocks is None or self.mask is None:
            rows = slice(self.start, self.stop)
            k, v = (own[rows].transpose(0, 1).unsqueeze(0) for own in (call.keys, call.values))
        else:
            k, v = call.cache.read(call.layer, self.head_blocks, 1)
        return attend_request(q, k, v, self.mask, call.scores)


@dataclass(frozen=True)
class AttentionPlan:
    """Where the rows of one step read and write in the cache. The row groups cover all rows.

    `paged` is the same for layers that run natively; None if torch attends. `elsewhere` are the plans of layers on
    other devices.
    """

    cache: KVCache
    slot_mapping: Tensor  # the slots of every row's keys and values: int64 [rows * kv heads]
    groups: Sequence[RowGroup]
    paged: PagedStep | None = None
    elsewhere: Mapping[torch.device, AttentionPlan] = field(default_factory=dict)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    **kw: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed rows: q is [1, heads, rows, head size], k and v are [1, kv heads, rows, head size]. Returns
    [1, rows, heads, head size], and no weights.
    """
    scores = _read_scores(module, q, kw)
    if plan is None:
        return _attend_without_plan(module, q, k, v, attention_mask, scores, kw)
    plan = plan.elsewhere.get(q.device, plan)
    layer = int(module.layer_idx) - plan.cache.first_layer  # type: ignore[arg-type]  # transformers' modules have one
    queries, keys, values = (heads[0].transpose(0, 1) for heads in (q, k, v))  # [rows, heads, head size]
    plan.cache.write(layer, plan.slot_mapping, keys, values)
    call = AttentionCall(layer, scores, plan.cache, keys, values)
    if len(plan.groups) == 1:
        return plan.groups[0].attend(queries, call).unsqueeze(0), None
    out = queries.new_empty(queries.shape)
    for group in plan.groups:
        rows = slice(group.start, group.stop)
        out[rows] = group.attend(queries[rows], call)
    return out.unsqueeze(0), None


def fits_sdpa(model: nn.Module, positions: int) -> bool:
    """Whether, up to so many positions, a model's attention is scaled dot-product attention, judging by its config and
    modules.
    """
    config: Any = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    softcap = getattr(config, "attn_logit_softcapping", None)
    has_sinks = any(hasattr(module, "sinks") for module in model.modules())
    chunk = getattr(config, "attention_chunk_size", None)
    return Scores(1.0, softcap, sliding_window=window, chunk=chunk).fit_sdpa(positions) and not has_sinks


def attend_request(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention of one request's consecutive positions q [rows, heads, head size] to k and v [1, kv heads, positions,
    head size], in the shape of q. `mask` is 0 or minus infinity, [rows, positions]; None means causal attention of
    equally many rows and positions.
    """
    query = q.transpose(0, 1).unsqueeze(0)
    if scores.fit_sdpa(k.shape[2]):
        out = F.scaled_dot_product_attention(
            query, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=True
        )
    else:
        out = eager_attention(query, k, v, None if mask is None else mask == 0, scores)
    return out[0].transpose(0, 1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scores: Scores) -> Tensor:
    """Attention with soft caps, sinks, sliding windows and chunks, in fp32: q is [batch, heads, rows, head size], k and
    v are [batch, kv heads, positions, head size].

    `visible` is the boolean mask [..., rows, positions], in which a row's own position is the last visible one. None
    means causal attention of equally many rows and positions.
    """
    _warn_slow(scores.feature)
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    product = (q @ k.transpose(-1, -2)).float() * scores.scale  # [batch, heads, rows, positions]
    if scores.softcap is not None:
        product = torch.tanh(product / scores.softcap) * scores.softcap
    if visible is None:
        visible = torch.ones(product.shape[-2:], dtype=torch.bool, device=q.device).tril()
    own, positions = visible.sum(-1, keepdim=True) - 1, torch.arange(visible.shape[-1], device=q.device)
    if scores.sliding_window is not None:
        visible = visible & (positions > own - scores.sliding_window)
    if scores.chunk is not None:
        visible = visible & (positions >= own - own % scores.chunk)
    product = product.masked_fill(~visible, torch.finfo(product.dtype).min)  # finite, so that padding rows are not NaN
    if scores.sinks is not None:
        sinks = scores.sinks.float().view(-1, 1, 1).expand(*product.shape[:-1], 1)
        product = torch.cat([product, sinks], -1)
    return product.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def _read_scores(module: nn.Module, q: Tensor, kw: dict[str, Any]) -> Scores:
    """The scores that a layer asks for, by the argument names of transformers; of chunks only its config tells."""
    if unsupported := [name for name in _UNSUPPORTED if kw.get(name) is not None]:
        raise UnusableModel(
            f"the model's attention uses {', '.join(unsupported)}, which the paged cache does not support"
        )
    scale = kw.get("scaling")
    return Scores(
        q.shape[-1] ** -0.5 if scale is None else scale,
        kw.get("softcap"),
        kw.get("s_aux"),
        kw.get("sliding_window"),
        _find_chunk(module),
    )


def _find_chunk(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    return chunk if chunk and config.layer_types[module.layer_idx] == "chunked_attention" else None


def _attend_without_plan(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, kw: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attention of an ordinary call. torch's has neither caps nor sinks; the mask includes the sliding window."""
    if scores.softcap is None and scores.sinks is None:
        return attend_short(module, q, k, v, mask, **kw)
    visible = mask if mask is None or mask.dtype is torch.bool else mask == 0
    unwindowed = Scores(scores.scale, scores.softcap, scores.sinks)
    return eager_attention(q, k, v, visible, unwindowed).transpose(1, 2), None


@cache
def _warn_slow(feature: str) -> None:
    _log.warning("this model's attention has %s and runs without a fused kernel, which is slower", feature)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
