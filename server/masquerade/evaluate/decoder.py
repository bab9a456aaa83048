"""Decodes a batch of prompts: with the native layers as the engine does, or by transformers with a padded cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.paged import BLOCK, PASS_TOKENS, PagedRows, Prompt, find_native_stack
from masquerade.evaluate.prefix import count_shared, extend, keeps_all, of_prompt
from masquerade.evaluate.treatment import Treatment
from masquerade.model import Base, NativeStack, Span, make_route


class Decoder(Protocol):
    """The state of a batch of rows. Call `read_prompts`, then `step` and `keep` in turn."""

    def read_prompts(self) -> Iterator[None]:
        """Read all prompts but their last tokens; a work item is a pass of the model."""

    def step(self, ids: Sequence[int]) -> Tensor:
        """The logits [rows, vocabulary] after one more token of each row, of which the first is a prompt's last."""

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some of the rows."""


def make_decoders(base: Base, prompts: Sequence[Prompt], treatment: Treatment, longest: int) -> Iterator[Decoder]:
    """What can decode the prompts and what follows them, up to `longest` tokens a row, the fastest first. All but the
    last may raise `NotNative` before `step` returns anything.
    """
    if (stack := find_native_stack(base, treatment)) is not None:
        yield PagedDecoder(base, prompts, treatment, longest, stack)
    yield CachedDecoder(base, prompts, treatment)


class PagedDecoder(PagedRows):
    """Decodes with the native layers. Each row has blocks for its prompt and all that follows it."""

    def __init__(
        self, base: Base, prompts: Sequence[Prompt], treatment: Treatment, longest: int, stack: NativeStack
    ) -> None:
        width = -(-longest // BLOCK)
        tables = np.arange(len(prompts) * width).reshape(-1, width)
        super().__init__(base, prompts, treatment, stack, tables, tables.size)
        self._rows = np.arange(len(prompts))  # those that go on

    def step(self, ids: Sequence[int]) -> Tensor:
        """See `Decoder`."""
        return self._extend(self._rows, [(one,) for one in ids], self._treatment)

    def keep(self, places: Sequence[int]) -> None:
        """See `Decoder`."""
        self._rows = self._rows[places]


class CachedDecoder:
    """Prompts are padded on the left."""

    def __init__(self, base: Base, prompts: Sequence[Prompt], treatment: Treatment) -> None:
        self._base, self._prompts, self._treatment = base, prompts, treatment
        self._cache = DynamicCache(config=base.model.config)
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        self._shared = count_shared(prompts) if keeps_all(self._cache) else 0  # before the padding, not after
        places = torch.arange(longest)
        hidden = (places >= self._shared) & (places < self._shared + padding[:, None])
        self._visible = (~hidden).long().to(base.device)  # [rows, positions]

    def read_prompts(self) -> Iterator[None]:
        """See `Decoder`."""
        shared, (rows, longest) = self._shared, self._visible.shape
        for start in range(0, shared, PASS_TOKENS):
            stop = min(start + PASS_TOKENS, shared)
            extend(self._base, self._cache, self._prompts[0][start:stop], self._treatment)
            yield
        if shared:
            self._cache.batch_repeat_interleave(rows)
        ids = torch.zeros(rows, longest - shared, dtype=torch.long)
        for row, prompt in enumerate(self._prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt[shared:])
        ids, width = ids.to(self._base.device), max(1, PASS_TOKENS // rows)
        for start in range(0, longest - shared - 1, width):
            stop = min(start + width, longest - shared - 1)
            self._run(ids[:, start:stop], self._visible[:, : shared + stop], of_prompt(self._treatment))
            yield
        self._visible = self._visible[:, :-1]  # `step` adds the last one again

    def step(self, ids: Sequence[int]) -> Tensor:
        """See `Decoder`."""
        self._visible = torch.cat([self._visible, self._visible.new_ones(len(ids), 1)], dim=1)
        return self._run(torch.tensor(ids, device=self._base.device).unsqueeze(1), self._visible, self._treatment)

    def keep(self, places: Sequence[int]) -> None:
        """See `Decoder`."""
        index = torch.tensor(places, device=self._base.device)
        self._cache.batch_select_indices(index)
        self._visible = self._visible[index]

    @torch.no_grad()
    def _run(self, ids: Tensor, visible: Tensor, treatment: Treatment) -> Tensor:
        """Logits after the last of `ids` [rows, new]; `visible` [rows, past + new] is 0 at padding."""
        positions = (visible.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        spans = [Span(treatment.applied, 0, ids.numel())] if treatment.applied else []
        with treatment.around():
            output = self._base.model(
                input_ids=ids,
                attention_mask=visible,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                route=make_route(spans),
            )
        logits: Tensor = output.logits[:, -1]
        return logits
