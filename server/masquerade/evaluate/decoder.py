"""Decodes a batch of prompts: with the native layers as the engine does, or by transformers with a padded cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.prefix import count_shared, extend, of_prompt
from masquerade.evaluate.treatment import Treatment
from masquerade.kernels import PagedChunks, PagedStep, attends
from masquerade.model import Base, NativePlan, NativeStack, Span, find_stack, make_route

PASS_TOKENS = 512  # most tokens of prompts in a pass
BLOCK = 64  # positions of a block of the cache

Prompt = tuple[int, ...]


class Decoder(Protocol):
    """The state of a batch of rows. Call `read_prompts`, then `step` and `keep` in turn."""

    def read_prompts(self) -> Iterator[None]:
        """Read all prompts but their last tokens; a work item is a pass of the model."""

    def step(self, ids: Sequence[int]) -> Tensor:
        """The logits [rows, vocabulary] after one more token of each row, of which the first is a prompt's last."""

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some of the rows."""


def make_decoders(base: Base, prompts: Sequence[Prompt], treatment: Treatment, tokens: int) -> Iterator[Decoder]:
    """What can decode the prompts and `tokens` more of each, the fastest first. All but the last may raise `NotNative`
    before `step` returns anything.
    """
    stack = _find_native_stack(base) if treatment.around is nullcontext else None  # else there may be hooks
    if stack is not None:
        yield PagedDecoder(base, prompts, treatment, tokens, stack)
    yield CachedDecoder(base, prompts, treatment)


def decodes_rows_alone(base: Base) -> bool:
    """Whether the native layers decode the base's own answers, which are then the same in any batch."""
    return _find_native_stack(base) is not None


def _find_native_stack(base: Base) -> NativeStack | None:
    stack = find_stack(base.model)
    if stack is None or not attends(torch.empty(0, stack.head_size, dtype=base.dtype, device=base.device)):
        return None
    return stack


class PagedDecoder:
    """Rows are packed without padding, and each has blocks of the cache. A row's logits do not depend on the others,
    to the bit, where its products do not.
    """

    def __init__(
        self, base: Base, prompts: Sequence[Prompt], treatment: Treatment, tokens: int, stack: NativeStack
    ) -> None:
        self._base, self._prompts, self._treatment, self._stack = base, prompts, treatment, stack
        self._width = -(-(max(map(len, prompts)) + tokens) // BLOCK)  # blocks of a row
        shape = stack.layers, len(prompts) * self._width * stack.kv_heads, BLOCK, stack.head_size
        self._keys, self._values = (torch.zeros(shape, dtype=base.dtype) for _ in range(2))
        self._rows = np.arange(len(prompts))  # those that go on
        self._lengths = np.zeros(len(prompts), np.int64)  # positions in the cache, of all rows

    def read_prompts(self) -> Iterator[None]:
        """See `Decoder`."""
        treatment, shared = of_prompt(self._treatment), count_shared(self._prompts)
        for start in range(0, shared, PASS_TOKENS):
            self._run([0], [self._prompts[0][start : min(start + PASS_TOKENS, shared)]], treatment)
            yield
        self._share(shared)
        pending = [(row, prompt[shared:-1]) for row, prompt in enumerate(self._prompts) if len(prompt) > shared + 1]
        while pending:
            rows, parts, room = [], [], PASS_TOKENS
            while pending and room:
                row, ids = pending.pop(0)
                rows.append(row)
                parts.append(ids[:room])
                room -= len(parts[-1])
                if len(ids) > len(parts[-1]):
                    pending.insert(0, (row, ids[len(parts[-1]) :]))
            self._run(rows, parts, treatment)
            yield

    def step(self, ids: Sequence[int]) -> Tensor:
        """See `Decoder`."""
        return self._run(self._rows, [(one,) for one in ids], self._treatment)

    def keep(self, places: Sequence[int]) -> None:
        """See `Decoder`."""
        self._rows = self._rows[places]

    def _share(self, positions: int) -> None:
        """Copy the first positions of the first row to all others."""
        blocks = -(-positions // BLOCK)
        for cached in (self._keys, self._values):
            by_row = cached.view(self._stack.layers, len(self._prompts), self._width, -1)
            by_row[:, 1:, :blocks] = by_row[:, :1, :blocks]
        self._lengths[:] = positions

    @torch.no_grad()
    def _run(
        self, rows: Sequence[int] | NDArray[np.int64], parts: Sequence[Sequence[int]], treatment: Treatment
    ) -> Tensor:
        """The logits after the last token of each row's part. Raises `NotNative`."""
        counts = np.array([len(part) for part in parts])
        starts = self._lengths[rows]
        of_row = np.repeat(np.asarray(rows), counts)
        positions = np.concatenate(
            [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        )
        blocks = np.asarray(rows)[:, None] * self._width + np.arange(self._width)
        heads = (of_row * self._width + positions // BLOCK)[:, None] * self._stack.kv_heads
        heads = heads + np.arange(self._stack.kv_heads)
        slots = torch.from_numpy((heads * BLOCK + positions[:, None] % BLOCK).reshape(-1))
        step = PagedStep(PagedChunks(blocks, counts, starts + counts), slots, self._keys, self._values)
        spans = [Span(treatment.applied, 0, len(positions))] if treatment.applied else []
        logits: Tensor = self._base.model(
            input_ids=torch.tensor([[token for part in parts for token in part]]),
            position_ids=torch.from_numpy(positions[None]),
            use_cache=False,
            logits_to_keep=torch.from_numpy(counts.cumsum() - 1),
            route=make_route(spans, self._base.device),
            plan=NativePlan(step),
        ).logits[0]
        self._lengths[rows] += counts
        return logits


class CachedDecoder:
    """Prompts are padded on the left."""

    def __init__(self, base: Base, prompts: Sequence[Prompt], treatment: Treatment) -> None:
        self._base, self._prompts, self._treatment = base, prompts, treatment
        self._cache = DynamicCache(config=base.model.config)
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        self._shared = count_shared(prompts)  # before the padding, not after
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
                route=make_route(spans, self._base.device),
            )
        logits: Tensor = output.logits[:, -1]
        return logits
