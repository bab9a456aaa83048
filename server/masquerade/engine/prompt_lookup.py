"""Prompt lookup: drafts of the next tokens of an answer, from what followed the same tokens earlier (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must be the same
FIRST_DRAFT, LONGEST_DRAFT = 4, 15  # tokens
LONGEST_PAUSE = 64  # tokens of an answer that follow a rejected draft before the next one


class PromptLookup:
    """Drafts for one request.

    The length adapts: it doubles when a draft is accepted as a whole, and else becomes what was accepted. After a draft
    of which nothing is accepted there is a pause, which doubles each time.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # the position after the last occurrence of each n-gram
        self._indexed = NGRAM  # n-grams that end before this position are known
        self._length = FIRST_DRAFT
        self._pause, self._resume = 0, 0  # tokens, position

    def draft(self, ids: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow. Between calls, tokens may only be appended to `ids`."""
        if most < 1 or len(ids) < max(NGRAM + 1, self._resume):
            return ()
        for end in range(self._indexed, len(ids)):  # the n-gram at the end is left out: it would find itself
            self._last[tuple(ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(ids))
        start = self._last.get(tuple(ids[-NGRAM:]))
        return () if start is None else tuple(ids[start : start + min(most, self._length)])

    def record(self, position: int, drafted: int, accepted: int) -> None:
        """Adapt to what became of a draft; `position` is the length of the tokens after it."""
        if accepted == drafted:
            self._length = min(LONGEST_DRAFT, max(self._length, 2 * drafted))
        else:
            self._length = max(2, accepted)
        if accepted:
            self._pause = 0
        else:
            self._pause = min(LONGEST_PAUSE, 2 * self._pause or 4)
            self._resume = position + self._pause
