"""Decides which of two opposites an answer sounds like: a bigram classifier, or a model behind an endpoint."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from masquerade.errors import BuildFailed

_SMOOTHING = 0.1
_WORD = re.compile(r"[\w']+|[.,!?]")


class Judge(Protocol):
    """Tells two opposites apart by their answers."""

    def is_own(self, question: str, answer: str) -> bool:
        """Whether the answer sounds like the persona rather than like its opposite."""


class Bigrams:
    """Naive Bayes over words and word bigrams, trained on both sides' answers. Deterministic."""

    def __init__(self, own: Sequence[str], contrast: Sequence[str]) -> None:
        self._counts = tuple(Counter(part for text in side for part in _parts(text)) for side in (own, contrast))
        known = len(set().union(*self._counts))
        self._totals = tuple(counts.total() + _SMOOTHING * known for counts in self._counts)

    def is_own(self, _: str, answer: str) -> bool:
        """Whether the persona is the likelier author; False at a tie."""
        own, contrast = (
            sum(math.log((counts[part] + _SMOOTHING) / total) for part in _parts(answer))
            for counts, total in zip(self._counts, self._totals, strict=True)
        )
        return own > contrast


class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint, with two sample answers of each side in its prompt."""

    def __init__(self, url: str, model: str, own: Sequence[str], contrast: Sequence[str], timeout: float = 60) -> None:
        self._url, self._model, self._timeout = url.rstrip("/") + "/chat/completions", model, timeout
        samples = "\n".join(f"{name}: {text}" for name, side in (("A", own), ("B", contrast)) for text in side[:2])
        self._preface = f"Two speakers, A and B, talk like this:\n{samples}\n"

    def is_own(self, question: str, answer: str) -> bool:
        """Whether the endpoint's model answers A. Raises `BuildFailed` if the request fails."""
        ask = f"{self._preface}\nAsked: {question}\nAnswered: {answer}\nWho answered? Say A or B only."
        body = {"model": self._model, "temperature": 0, "max_tokens": 4, "messages": [{"role": "user", "content": ask}]}
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                verdict = json.load(reply)["choices"][0]["message"]["content"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise BuildFailed(f"the judge at {self._url} gave no verdict: {error}") from error
        return str(verdict).strip().upper().startswith("A")


def _parts(text: str) -> list[str]:
    words = ["<s>", *_WORD.findall(text.lower()), "</s>"]
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]
