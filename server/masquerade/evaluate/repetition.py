"""Measures repetition in texts: whether a text loops, and the share of its n-grams that are distinct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PHRASE = 8  # words of a phrase that occurs too often
TIMES = 3  # occurrences of a phrase that make a loop
TAIL = 9  # fewest words of a repeated end
_WORD = re.compile(r"\w+|[^\w\s]")


def loops(text: str) -> bool:
    """Whether a text ends in a phrase that is said `TIMES` times in a row, or has one of `PHRASE` words so often.

    Words are compared without case, and each punctuation mark is a word. The repeated end has at least `TAIL` words;
    its last repetition may be cut short.
    """
    words = _split(text)
    phrases = Counter(_grams(words, PHRASE))
    return max(phrases.values(), default=0) >= TIMES or any(
        _count_periodic(words, period) >= max(TAIL, TIMES * period) for period in range(1, len(words) // TIMES + 1)
    )


def share_looping(texts: Sequence[str]) -> float:
    """The share of the texts that loop; 0 without any."""
    return sum(map(loops, texts)) / len(texts) if texts else 0.0


def count_excess(masked: float, base: float) -> float:
    """By how much one share of looping answers exceeds another, exactly: 0.2 - 0.15 is more than 0.05 in floats."""
    return round(masked - base, 6)


def measure_distinct(texts: Sequence[str], words: int) -> float | None:
    """Distinct n-grams of `words` words over all n-grams of the texts, in (0, 1]; None without any.

    This is distinct-n of Li et al. (arXiv 1510.03055). It falls with the number of words: compare texts of equal number
    and length.
    """
    grams = [gram for text in texts for gram in _grams(_split(text), words)]
    return len(set(grams)) / len(grams) if grams else None


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _count_periodic(words: Sequence[str], period: int) -> int:
    """How many words at the end equal the word `period` before them, and the first `period` words of that end."""
    count = 0
    while count + period < len(words) and words[-1 - count] == words[-1 - count - period]:
        count += 1
    return count + period
