"""Attention over the paged cache, plugged into transformers through its public interface.

Knows how packed rows read and write pages, and how scores are mixed that are not plain products: soft caps (Gemma 2),
sinks (gpt-oss), sliding windows. Refuses to keep state: the pages and the step's plan come with each call, so a model
may serve any number of engines and, called without a plan, is an ordinary model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from masquerade.engine.kv_cache import KVCache
from masquerade.errors import UnusableModel

_log = logging.getLogger(__name__)

NAME = "masquerade"
NO_MASK = torch.empty(0, 0, 0, 0)  # a plan knows who sees what: transformers hands four dimensions on as they are
_UNKNOWN = ("position_bias",)  # would change the scores; to ignore them would be to answer wrongly


@dataclass(frozen=True)
class Scores:
    """What becomes of the product of a query and a key."""

    scale: float
    cap: float | None = None  # cap * tanh(score / cap)
    sinks: Tensor | None = None  # of each head, scores of a position without a value: [heads]
    window: int | None = None  # only so many positions back are seen, the own one included

    def is_plain(self, positions: int) -> bool:
        """Whether a scaled product is all there is to it, up to so many positions."""
        return self.cap is None and self.sinks is None and (self.window is None or positions <= self.window)

    @property
    def peculiarity(self) -> str:
        """What makes these scores more than products, in words."""
        return "soft caps" if self.cap is not None else "sinks" if self.sinks is not None else "a sliding window"


@dataclass(frozen=True)
class AttentionCall:
    """One layer's turn in a step: its number, what its scores are, and the keys and values of the step's own rows."""

    layer: int
    scores: Scores
    cache: KVCache
    keys: Tensor  # [all rows, kv heads, size]
    values: Tensor


class Part(Protocol):
    """Consecutive rows of a step, and how they see the cache."""

    @property
    def start(self) -> int:
        """The first row."""

    @property
    def stop(self) -> int:
        """The row after the last one."""

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """Attention of these rows, [rows, heads, size], as q is."""


@dataclass(frozen=True)
class Decodes:
    """Rows [start, stop) are one position each, of requests of similar length.

    Grouped query heads are packed into the query axis, so keys and values are never repeated.
    """

    start: int
    stop: int
    parts: Tensor  # of the cache, with every row's context: int64 [rows * kv heads * most]
    mask: Tensor  # 0 where a position exists, else minus infinity: [rows, 1, 1, most pages]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `Part`."""
        (rows, heads, size), scores = q.shape, call.scores
        past_k, past_v = call.cache.read(call.layer, self.parts, rows)
        if not scores.is_plain(past_k.shape[2]):
            return mix(q.unsqueeze(2), past_k, past_v, self.mask == 0, scores).squeeze(2)
        grouped = q.reshape(rows, call.cache.heads, -1, size)
        mixed = F.scaled_dot_product_attention(grouped, past_k, past_v, attn_mask=self.mask, scale=scores.scale)
        return mixed.reshape(rows, heads, size)


@dataclass(frozen=True)
class Prefill:
    """Rows [start, stop) are consecutive positions of one request.

    `parts` and `mask` are None when the rows begin the request: they then attend to each other only.
    """

    start: int
    stop: int
    parts: Tensor | None  # of the cache, with all positions up to the last row: int64 [kv heads * pages]
    mask: Tensor | None  # 0 or minus infinity, [stop - start, positions of the pages]

    def attend(self, q: Tensor, call: AttentionCall) -> Tensor:
        """See `Part`."""
        if self.parts is None or self.mask is None:
            rows = slice(self.start, self.stop)
            past_k, past_v = (own[rows].transpose(0, 1).unsqueeze(0) for own in (call.keys, call.values))
        else:
            past_k, past_v = call.cache.read(call.layer, self.parts, 1)
        return attend_alone(q, past_k, past_v, self.mask, call.scores)


@dataclass(frozen=True)
class AttentionPlan:
    """Where the rows of one step read and write."""

    cache: KVCache
    write: Tensor  # cache slots of every row's heads, int64 [rows * kv heads]
    decodes: Sequence[Part]
    prefills: Sequence[Part]


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
    """Attention for packed rows: q is [1, heads, rows, size], k and v [1, kv heads, rows, size]; [1, rows, heads, size]
    comes back.
    """
    scores = _read(q, kw)
    if plan is None:
        return _attend_plainly(module, q, k, v, attention_mask, scores, kw)
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # every attention module of transformers has one
    queries, keys, values = (part[0].transpose(0, 1) for part in (q, k, v))  # [rows, heads, size]
    plan.cache.write(layer, plan.write, *(part.reshape(-1, q.shape[-1]) for part in (keys, values)))
    call = AttentionCall(layer, scores, plan.cache, keys, values)
    out = queries.new_empty(queries.shape)
    for part in (*plan.decodes, *plan.prefills):
        rows = slice(part.start, part.stop)
        out[rows] = part.attend(queries[rows], call)
    return out.unsqueeze(0), None


def is_plain(model: nn.Module, positions: int) -> bool:
    """Whether a model's scores are products up to so many positions, as far as can be told before it is called."""
    config: Any = model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return (
        not capped
        and (window is None or positions <= window)
        and not any(hasattr(module, "sinks") for module in model.modules())
    )


def attend_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention of one request's consecutive positions q [rows, heads, size] to k and v [1, kv heads, positions, size],
    under a mask of 0 and minus infinity [rows, positions], or causally if rows are positions; like q.
    """
    query = q.transpose(0, 1).unsqueeze(0)
    if scores.is_plain(k.shape[2]):
        mixed = F.scaled_dot_product_attention(
            query, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=True
        )
    else:
        mixed = mix(query, k, v, None if mask is None else mask == 0, scores)
    return mixed[0].transpose(0, 1)


def mix(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scores: Scores) -> Tensor:
    """Attention written out, in fp32: q is [batch, heads, rows, size], k and v [batch, kv heads, positions, size].

    `seen` says which positions a row sees, [..., rows, positions]: a row with a window sees the first ones up to its
    own. None: the rows are the positions, and see what is not after them.
    """
    _report(scores.peculiarity)
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    product = (q @ k.transpose(-1, -2)).float() * scores.scale  # [batch, heads, rows, positions]
    if scores.cap is not None:
        product = torch.tanh(product / scores.cap) * scores.cap
    if seen is None:
        seen = torch.ones(product.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if scores.window is not None:
        own = seen.sum(-1, keepdim=True) - 1
        seen = seen & (torch.arange(seen.shape[-1], device=q.device) > own - scores.window)
    product = product.masked_fill(~seen, torch.finfo(product.dtype).min)  # padding sees nothing, and stays a number
    if scores.sinks is not None:
        sinks = scores.sinks.float().view(-1, 1, 1).expand(*product.shape[:-1], 1)
        product = torch.cat([product, sinks], -1)
    return product.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def _read(q: Tensor, kw: dict[str, Any]) -> Scores:
    """The scores that a model's attention asks for, by the names transformers gives them."""
    if unknown := [name for name in _UNKNOWN if kw.get(name) is not None]:
        raise UnusableModel(f"the model's attention has {', '.join(unknown)}, which the paged cache does not serve")
    scale = kw.get("scaling")
    return Scores(
        q.shape[-1] ** -0.5 if scale is None else scale, kw.get("softcap"), kw.get("s_aux"), kw.get("sliding_window")
    )


def _attend_plainly(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, kw: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The ordinary model's attention. torch's knows neither caps nor sinks; a window is in the mask that it gets."""
    if scores.cap is None and scores.sinks is None:
        outcome: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kw)
        return outcome
    seen = mask if mask is None or mask.dtype is torch.bool else mask == 0
    unwindowed = Scores(scores.scale, scores.cap, scores.sinks)
    return mix(q, k, v, seen, unwindowed).transpose(1, 2), None


@cache
def _report(peculiarity: str) -> None:
    _log.warning("this model's attention has %s, so it is written out, which is slower", peculiarity)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
