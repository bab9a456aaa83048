"""The tokens that all prompts of a measurement begin with, such as a system prompt: computed once for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, Span, make_route

WORTH = 64  # positions; a pass of its own takes as long as so few more in a larger one


def count_shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, fewer than any has; 0 if to compute them once saves too little."""
    if not prompts:
        return 0
    ends = zip(min(prompts), max(prompts), strict=False)  # what the first and the last in order share, all do
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    shared = min(same, min(map(len, prompts)) - 1)
    return shared if shared * (len(prompts) - 1) >= WORTH else 0


def keeps_all(cache: DynamicCache) -> bool:
    """Whether every layer of a cache keeps all positions. Windows and chunks are counted by place in the cache, so that
    padding behind a prefix would take part of them.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def of_prompt(treatment: Treatment) -> Treatment:
    """What applies to all tokens of a prompt but the last."""
    return UNTREATED if treatment.applied is not None and treatment.phase == "decode" else treatment


@torch.no_grad()
def extend(base: Base, cache: DynamicCache, ids: Sequence[int], treatment: Treatment) -> None:
    """Add the keys and values of a prompt's next tokens to a cache of one row."""
    applied = of_prompt(treatment).applied
    spans = [Span(applied, 0, len(ids))] if applied else []
    with treatment.around():
        base.model(
            input_ids=torch.tensor([ids], device=base.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            route=make_route(spans),
        )


def repeat(cache: DynamicCache, rows: int) -> DynamicCache:
    """A copy of a cache of one row, with as many equal rows."""
    found = copy.deepcopy(cache)
    found.batch_repeat_interleave(rows)
    return found
