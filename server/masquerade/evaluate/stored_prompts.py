"""Keys and values of prompts, computed once for all treatments that leave prompts to the base."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, batches
from masquerade.evaluate.paged import Prompt, find_native_stack
from masquerade.evaluate.prefix import count_shared, extend, keeps_all, repeat
from masquerade.evaluate.scorer import PagedScorer
from masquerade.evaluate.treatment import UNTREATED
from masquerade.model import Base, NotNative

MOST_BYTES = 256 << 20  # of keys and values


class StoredPrompts:
    """The base's keys and values of prompts of two tokens or more, without those of their last tokens.

    They are for the native layers, if these compute the base. There are none of a model with sliding windows, whose
    caches drop positions, and no more after the first set of prompts that would take more than `MOST_BYTES`.
    """

    def __init__(self, base: Base) -> None:
        self._base, self._stack = base, find_native_stack(base)
        self._scorers: list[PagedScorer] = []  # of the native layers; the states are for transformers'
        self._states: dict[Prompt, list[tuple[Tensor, Tensor]]] = {}  # of each layer, [heads, positions, size]
        self._closed = not keeps_all(DynamicCache(config=base.model.config))

    def hold(self, examples: Iterable[Encoded]) -> bool:
        """Whether the prompts of all examples are stored for transformers."""
        return all(one.prompt in self._states for one in examples)

    def find_scorers(self, examples: Sequence[Encoded]) -> list[tuple[PagedScorer, list[int]]]:
        """What predicts the examples natively, and which of them; empty if it does not have all of them."""
        found = [
            (scorer, [index for index, one in enumerate(examples) if scorer.holds(one)]) for scorer in self._scorers
        ]
        return found if sum(len(index) for _, index in found) == len(examples) else []

    @torch.no_grad()
    def store(self, examples: Iterable[Encoded]) -> Generator[None, None, None]:
        """Store the prompts of examples; a work item is a micro-batch."""
        examples = list(examples)
        known = {*self._states, *(prompt for scorer in self._scorers for prompt in scorer.prompts)}
        asked = dict.fromkeys(one.prompt for one in examples if len(one.prompt) > 1)
        prompts = [prompt for prompt in asked if prompt not in known]
        if self._closed or not prompts:
            return
        if self._stack is not None:
            with suppress(NotNative):
                yield from self._store_natively(prompts, max(len(one.response) for one in examples))
                return
            self._stack = None
        shared = min(count_shared(prompts), min(map(len, prompts)) - 2)  # a token at least is left
        prefix = DynamicCache(config=self._base.model.config)
        if shared:
            extend(self._base, prefix, prompts[0][:shared], UNTREATED)
        for batch in batches(
            [Encoded(one[shared:-1], ()) for one in prompts], self._base.device, BATCH_TOKENS - shared
        ):
            cache = repeat(prefix, len(batch.ids))
            self._base.model(input_ids=batch.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            positions = sum(map(len, (*self._states, *prompts)))
            if positions * sum(part[0, :, 0].nbytes for part in _parts(cache)) > MOST_BYTES:
                self._closed = True
                return
            for row, index in enumerate(batch.index):
                stop = len(prompts[index]) - 1
                kept = [part[row, :, :stop].clone() for part in _parts(cache)]
                self._states[prompts[index]] = list(zip(kept[::2], kept[1::2], strict=True))
            yield

    def _store_natively(self, prompts: Sequence[Prompt], longest: int) -> Generator[None, None, None]:
        assert self._stack is not None
        taken = sum(scorer.nbytes for scorer in self._scorers)
        if taken + PagedScorer.measure(self._base, prompts, longest, self._stack) > MOST_BYTES:
            self._closed = True
            return
        scorer = PagedScorer(self._base, prompts, UNTREATED, longest, self._stack)
        yield from scorer.read_prompts()
        self._scorers.append(scorer)

    def attach(self, examples: Sequence[Encoded], length: int) -> dict[str, Any]:
        """What the model is called with beside `length` positions that follow the stored ones, a row an example."""
        device, prompts = self._base.device, [one.prompt for one in examples]
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
        longest = int(lengths.max())
        visible = torch.arange(longest) >= longest - lengths[:, None]  # padded on the left
        cache = DynamicCache(config=self._base.model.config)
        for layer in range(len(cache.layers)):
            stored = zip(*(self._states[prompt][layer] for prompt in prompts), strict=True)
            cache.update(*(_align(states, longest) for states in stored), layer)
        return {
            "past_key_values": cache,
            "use_cache": True,
            "attention_mask": torch.cat([visible, visible.new_ones(len(prompts), length)], dim=1).long().to(device),
            "position_ids": (lengths[:, None] + torch.arange(length)).to(device),
        }


def _parts(cache: DynamicCache) -> Iterator[Tensor]:
    """The keys and the values of each layer in turn, [rows, heads, positions, size]."""
    return (part for layer in cache.layers for part in (layer.keys, layer.values))


def _align(states: Sequence[Tensor], longest: int) -> Tensor:
    """States [heads, positions, size] as rows [rows, heads, longest, size], padded on the left."""
    heads, _, size = states[0].shape
    aligned = states[0].new_zeros(len(states), heads, longest, size)
    for row, of_row in zip(aligned, states, strict=True):
        row[:, longest - of_row.shape[1] :] = of_row
    return aligned
