"""Decodes a batch of prompts: with the native layers as the engine does, or by transformers with a padded cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.prefix import count_shared, extend, of_prompt
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.kernels import PagedChunks, PagedStep, attends
from masquerade.model import Base, NativePlan, NativeStack, Span, find_stack, make_route

PASS_TOKENS = 512  # most tokens of prompts in a pass
BLOCK = 64  # positions of a block of the cache

Prompt = tuple[int, ...]
Tables = NDArray[np.int64]


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
    if (stack := find_native_stack(base, treatment)) is not None:
        yield PagedDecoder(base, prompts, treatment, tokens, stack)
    yield CachedDecoder(base, prompts, treatment)


def find_native_stack(base: Base, treatment: Treatment = UNTREATED) -> NativeStack | None:
    """What computes the base with a treatment natively, and so the same for a row in any batch; None if nothing does.

    A hook that nobody knows of may still make it raise `NotNative`.
    """
    stack = find_stack(base.model)
    if stack is None or treatment.around is not nullcontext:  # there may be hooks
        return None
    supported = attends(torch.empty(0, stack.head_size, dtype=base.dtype, device=base.device))
    spans = [Span(treatment.applied, 0, 1)] if treatment.applied else []
    return stack if supported and make_route(spans, base.device).is_native else None


class PagedRows:
    """Rows in a paged cache, of which a pass computes some, packed without padding. A row's logits do not depend on the
    others, to the bit, where its products do not.
    """

    def __init__(
        self,
        base: Base,
        prompts: Sequence[Prompt],
        treatment: Treatment,
        stack: NativeStack,
        tables: Tables,
        blocks: int,
    ) -> None:
        """`tables` has the blocks of each row, [rows, blocks of a row], of `blocks` in all."""
        self._base, self._prompts, self._treatment, self._stack = base, prompts, treatment, stack
        self._tables = tables
        shape = stack.layers, blocks * stack.kv_heads, BLOCK, stack.head_size
        self._keys, self._values = (torch.zeros(shape, dtype=base.dtype) for _ in range(2))
        self._lengths = np.zeros(len(prompts), np.int64)  # positions in the cache, of all rows

    def read_prompts(self) -> Iterator[None]:
        """Read all prompts but their last tokens; a work item is a pass of the model."""
        treatment, shared = of_prompt(self._treatment), count_shared(self._prompts)
        for start in range(0, shared, PASS_TOKENS):
            self._extend([0], [self._prompts[0][start : min(start + PASS_TOKENS, shared)]], treatment)
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
            self._extend(rows, parts, treatment)
            yield

    def _share(self, positions: int) -> None:
        """Copy the first positions of the first row to all others."""
        first, *others = self._tables[:, : -(-positions // BLOCK)]
        for cached in (self._keys, self._values):
            by_block = cached.view(self._stack.layers, -1, self._stack.kv_heads * BLOCK * self._stack.head_size)
            for blocks in others:
                by_block[:, blocks] = by_block[:, first]
        self._lengths[:] = positions

    def _extend(
        self, rows: Sequence[int] | NDArray[np.int64], parts: Sequence[Sequence[int]], treatment: Treatment
    ) -> Tensor:
        """Add a part to each of some rows; the logits after its last token. Raises `NotNative`."""
        counts = np.array([len(part) for part in parts])
        logits = self._run(self._tables[rows], self._lengths[rows], parts, treatment, counts.cumsum() - 1)
        self._lengths[rows] += counts
        return logits

    @torch.no_grad()
    def _run(
        self,
        tables: Tables,
        starts: NDArray[np.int64],
        parts: Sequence[Sequence[int]],
        treatment: Treatment,
        kept: NDArray[np.int64],
    ) -> Tensor:
        """Compute parts that begin at positions `starts` of the rows with these blocks; the logits after the tokens
        that are `kept`, counted over all parts. Raises `NotNative`.
        """
        counts = np.array([len(part) for part in parts])
        of_part = np.repeat(np.arange(len(parts)), counts)
        positions = np.concatenate(
            [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        )
        heads = tables[of_part, positions // BLOCK][:, None] * self._stack.kv_heads + np.arange(self._stack.kv_heads)
        slots = torch.from_numpy((heads * BLOCK + positions[:, None] % BLOCK).reshape(-1))
        step = PagedStep(PagedChunks(tables, counts, starts + counts), slots, self._keys, self._values)
        spans = [Span(treatment.applied, 0, len(positions))] if treatment.applied else []
        logits: Tensor = self._base.model(
            input_ids=torch.tensor([[token for part in parts for token in part]]),
            position_ids=torch.from_numpy(positions[None]),
            use_cache=False,
            logits_to_keep=torch.from_numpy(kept),
            route=make_route(spans, self._base.device),
            plan=NativePlan(step),
        ).logits[0]
        return logits


class PagedDecoder(PagedRows):
    """Decodes with the native layers. Each row has blocks for its prompt and all that follows it."""

    def __init__(
        self, base: Base, prompts: Sequence[Prompt], treatment: Treatment, tokens: int, stack: NativeStack
    ) -> None:
        width = -(-(max(map(len, prompts)) + tokens) // BLOCK)
        tables = np.arange(len(prompts) * width).reshape(-1, width)
        super().__init__(base, prompts, treatment, stack, tables, tables.size)
        self._rows = np.arange(len(prompts))  # those that go on

    def step(self, ids: Sequence[int]) -> Tensor:
        """See `Decoder`."""
        return self._extend(self._rows, [(one,) for one in ids], self._treatment)

    def keep(self, places: Sequence[int]) -> None:
        """See `Decoder`."""
        self._rows = self._rows[places]


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of some examples' responses."""

    index: Sequence[int]  # which examples these are
    logits: Tensor  # [tokens of their responses, vocabulary]
    following: Tensor  # int64: those tokens
    counts: Sequence[int]  # tokens of each


class PagedScorer(PagedRows):
    """Predicts responses to prompts that are read once, with the native layers. A row is a prompt; its response is in
    blocks that passes share.
    """

    def __init__(
        self, base: Base, prompts: Sequence[Prompt], treatment: Treatment, longest: int, stack: NativeStack
    ) -> None:
        """`longest` is the length of the longest response."""
        widths = [-(-(len(prompt) - 1) // BLOCK) for prompt in prompts]
        own = sum(widths)
        tables = np.zeros((len(prompts), max(1, *widths)), np.int64)
        for row, (width, end) in enumerate(zip(widths, np.cumsum(widths), strict=True)):
            tables[row, :width] = np.arange(end - width, end)
        self._spare = np.arange(own, own + _count_spare(longest))
        super().__init__(base, prompts, treatment, stack, tables, own + len(self._spare))
        self._row_of = {prompt: row for row, prompt in enumerate(prompts)}
        self._longest = longest

    @staticmethod
    def measure(base: Base, prompts: Sequence[Prompt], longest: int, stack: NativeStack) -> int:
        """Bytes that a scorer would take."""
        blocks = sum(-(-(len(prompt) - 1) // BLOCK) for prompt in prompts) + _count_spare(longest)
        return 2 * blocks * stack.layers * stack.kv_heads * BLOCK * stack.head_size * base.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts, in rows."""
        return self._prompts

    def holds(self, example: Encoded) -> bool:
        """Whether a response can be predicted."""
        return example.prompt in self._row_of and len(example.response) <= self._longest

    def predict(self, examples: Sequence[Encoded], treatment: Treatment) -> Iterator[Predictions]:
        """Predict responses after `read_prompts`. Raises `NotNative`."""
        todo = list(range(len(examples)))
        while todo:
            index, rows, tokens, blocks = list[int](), set[int](), 0, 0
            for at in todo:
                response, row = len(examples[at].response), self._row_of[examples[at].prompt]
                more = self._count_blocks(row, response)
                fits = tokens + response <= PASS_TOKENS and blocks + more <= len(self._spare)
                if index and (not fits or row in rows):  # two responses to a prompt would take the same places
                    break
                index.append(at)
                rows.add(row)
                tokens, blocks = tokens + response, blocks + more
            todo = todo[len(index) :]
            yield self._predict(index, [examples[at] for at in index], treatment)

    def _count_blocks(self, row: int, tokens: int) -> int:
        """Blocks beyond a row's own that so many tokens after its prompt take."""
        length = int(self._lengths[row])
        return -(-(length + tokens) // BLOCK) - -(-length // BLOCK)

    def _predict(self, index: Sequence[int], examples: Sequence[Encoded], treatment: Treatment) -> Predictions:
        rows = np.array([self._row_of[one.prompt] for one in examples])
        parts = [(one.prompt[-1], *one.response[:-1]) for one in examples]
        more = [self._count_blocks(row, len(part)) for row, part in zip(rows, parts, strict=True)]
        own = [-(-int(self._lengths[row]) // BLOCK) for row in rows]
        tables = np.zeros((len(rows), max(a + b for a, b in zip(own, more, strict=True))), np.int64)
        for place, (row, width, added, end) in enumerate(zip(rows, own, more, np.cumsum(more), strict=True)):
            tables[place, :width] = self._tables[row, :width]
            tables[place, width : width + added] = self._spare[end - added : end]
        counts = [len(part) for part in parts]
        logits = self._run(tables, self._lengths[rows], parts, treatment, np.arange(sum(counts)))
        return Predictions(index, logits, torch.tensor([token for one in examples for token in one.response]), counts)


def _count_spare(longest: int) -> int:
    """Blocks for the responses of a pass, of which the longest has so many tokens."""
    return -(-max(2 * PASS_TOKENS, longest) // BLOCK) + 1


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
