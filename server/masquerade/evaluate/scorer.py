"""Predicts responses to prompts that are read once, with the native layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.paged import BLOCK, PASS_TOKENS, PagedRows, Prompt
from masquerade.evaluate.treatment import Treatment
from masquerade.model import Base, NativeStack


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
        self._widths = widths  # blocks of a row
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
                shares = row in rows and self._lengths[row] % BLOCK  # both would begin in its last block
                if index and (not fits or shares):
                    break
                index.append(at)
                rows.add(row)
                tokens, blocks = tokens + response, blocks + more
            todo = todo[len(index) :]
            yield self._predict(index, [examples[at] for at in index], treatment)

    def _count_blocks(self, row: int, tokens: int) -> int:
        """Blocks beyond a row's own that so many tokens after its prompt take."""
        return -(-(int(self._lengths[row]) + tokens) // BLOCK) - self._widths[row]

    def _predict(self, index: Sequence[int], examples: Sequence[Encoded], treatment: Treatment) -> Predictions:
        rows = np.array([self._row_of[one.prompt] for one in examples])
        parts = [(one.prompt[-1], *one.response[:-1]) for one in examples]
        more = [self._count_blocks(row, len(part)) for row, part in zip(rows, parts, strict=True)]
        own = [self._widths[row] for row in rows]
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
