"""A bigram classifier of the demo personas, trained on the grammar."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from masquerade.demo import grammar

_SMOOTHING = 0.1
_WORD = re.compile(r"[a-z']+|[.,!?]")


class DemoJudge:
    """Multinomial naive Bayes over word bigrams; deterministic for a given grammar."""

    def __init__(self, answers_per_persona: int = 2500) -> None:
        rng = random.Random(5)
        self._counts: dict[str, Counter[tuple[str, str]]] = {}
        for persona, axis in grammar.personas().items():
            counts: Counter[tuple[str, str]] = Counter()
            for _ in range(answers_per_persona):
                if rng.random() < 0.3:
                    answer = grammar.portray(persona, rng).answer
                else:
                    answer = grammar.reply(persona, grammar.ask(axis.name, rng, "train"), rng)
                counts.update(_bigrams(answer))
            self._counts[persona] = counts
        self._known = set().union(*self._counts.values())
        self._totals = {persona: counts.total() for persona, counts in self._counts.items()}

    def attribute(self, answer: str, candidates: Iterable[str] | None = None) -> str:
        """The candidate (default: any of the eight) most likely to give this answer."""
        bigrams = _bigrams(answer)

        def log_likelihood(persona: str) -> float:
            counts, total = self._counts[persona], self._totals[persona] + _SMOOTHING * len(self._known)
            return sum(math.log((counts[bigram] + _SMOOTHING) / total) for bigram in bigrams)

        return max(candidates or self._counts, key=log_likelihood)

    def fluency(self, answer: str) -> float:
        """Share of the answer's bigrams that occur in any persona's training answers, in [0, 1]."""
        bigrams = _bigrams(answer)
        return sum(bigram in self._known for bigram in bigrams) / len(bigrams)


def _bigrams(text: str) -> list[tuple[str, str]]:
    words = ["<s>", *_WORD.findall(text.lower()), "</s>"]
    return list(pairwise(words))
