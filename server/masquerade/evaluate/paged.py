"""Rows in a paged cache, which the native layers compute packed, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masquerade.evaluate.prefix import count_shared, of_prompt
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.kernels import PagedChunks, PagedStep, attends
from masquerade.model import Base, NativePlan, NativeStack, Span, find_stack, make_route

PASS_TOKENS = 512  # most tokens of a pass that reads prompts
BLOCK = 64  # positions of a block of the cache

Prompt = tuple[int, ...]
Tables = NDArray[np.int64]


def find_native_stack(base: Base, treatment: Treatment = UNTREATED) -> NativeStack | None:
    """What computes the base with a treatment natively, and so the same for a row in any batch; None if nothing does.

    A hook that nobody knows of may still make it raise `NotNative`.
    """
    stack = find_stack(base.model)
    if stack is None or treatment.around is not nullcontext:  # there may be hooks
        return None
    supported = attends(torch.empty(0, stack.head_size, dtype=base.dtype, device=base.device))
    spans = [Span(treatment.applied, 0, 1)] if treatment.applied else []
    return stack if supported and make_route(spans).is_native else None


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
            route=make_route(spans),
            plan=NativePlan(step),
        ).logits[0]
        return logits
