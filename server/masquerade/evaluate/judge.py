"""Decides which of two opposites an answer sounds like: an n-gram classifier, or a model behind an endpoint."""

from __future__ import annotations

import http.client
import json
import math
import re
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from masquerade.errors import BuildFailed
from masquerade.evaluate.bootstrap import Floats, interval

LEAST_AUC = 0.8  # with a smaller one on held-out answers, a judge does not judge
_BUCKETS = 1 << 16  # of hashed n-grams
_LETTERS = (3, 4)  # sizes of n-grams of characters
_DECAY = 1e-3  # L2 penalty of the weights, for unit vectors and a mean loss
_STEPS = 100  # most steps of L-BFGS
_VERDICT = re.compile(r"\b([AB])\b")
_WORD = re.compile(r"[\w']+|[.,!?]")


class Judge(Protocol):
    """Tells two opposites apart by their answers."""

    def score(self, question: str, answer: str) -> float:
        """Above 0 if the answer sounds like the persona rather than like its opposite; 0 is a tie."""


class PersonaClassifier:
    """Logistic regression on hashed n-grams of words and characters, trained on both sides' answers. Deterministic.

    Answers are unit vectors, so that a long answer has no more weight than a short one.
    """

    def __init__(self, own: Sequence[str], contrast: Sequence[str]) -> None:
        indices, values, offsets = _vectorise([*own, *contrast])
        signs = torch.tensor([1.0] * len(own) + [-1.0] * len(contrast))
        sizes = torch.tensor([len(own), len(contrast)]).clamp(min=1)
        shares = torch.where(signs > 0, 0.5 / sizes[0], 0.5 / sizes[1])  # both sides weigh the same
        weights = torch.zeros(_BUCKETS, 1, requires_grad=True)
        offset = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, offset], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = F.embedding_bag(indices, weights, offsets, mode="sum", per_sample_weights=values)
            total = (shares * F.softplus(-signs * (found.squeeze(1) + offset))).sum() + _DECAY * weights.square().sum()
            torch.autograd.backward(total)
            return total

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        self._weights, self._offset = weights.detach(), float(offset.detach())

    def score(self, _: str, answer: str) -> float:
        """The log-odds that the persona answered; 0 for an answer without any word."""
        indices, values, offsets = _vectorise([answer])
        if not len(indices):
            return 0.0
        found = F.embedding_bag(indices, self._weights, offsets, mode="sum", per_sample_weights=values)
        return float(found) + self._offset


class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint, with two sample answers of each side in its prompt."""

    def __init__(self, url: str, model: str, own: Sequence[str], contrast: Sequence[str], timeout: float = 60) -> None:
        self._url, self._model, self._timeout = url.rstrip("/") + "/chat/completions", model, timeout
        samples = "\n".join(f"{name}: {text}" for name, side in (("A", own), ("B", contrast)) for text in side[:2])
        self._preface = f"Two speakers, A and B, talk like this:\n{samples}\n"

    def score(self, question: str, answer: str) -> float:
        """1 if the endpoint's model answers A, -1 for B, 0 for neither. Raises `BuildFailed` if the request fails."""
        ask = f"{self._preface}\nAsked: {question}\nAnswered: {answer}\nWho answered? Say A or B only."
        body = {"model": self._model, "temperature": 0, "max_tokens": 4, "messages": [{"role": "user", "content": ask}]}
        headers = {"content-type": "application/json"}
        try:
            request = urllib.request.Request(self._url, json.dumps(body).encode(), headers, method="POST")
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                verdict = json.load(reply)["choices"][0]["message"]["content"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            raise BuildFailed(f"the judge at {self._url} gave no verdict: {error}") from error
        said = _VERDICT.search(str(verdict))
        return {"A": 1.0, "B": -1.0}[said[1]] if said else 0.0


@dataclass(frozen=True)
class JudgeQuality:
    """How well a judge tells apart answers that it was not trained on."""

    auc: float
    interval: tuple[float, float]
    pairs: int

    @property
    def sufficient(self) -> bool:
        """Whether the judge may judge."""
        return self.auc >= LEAST_AUC


def examine(judge: Judge, pairs: Sequence[tuple[str, str, str]]) -> JudgeQuality:
    """The AUC of a judge on held-out (question, own answer, contrast answer), at least one, with a 95 % interval."""
    own, contrast = (np.array([judge.score(pair[0], pair[side]) for pair in pairs]) for side in (1, 2))
    ends = interval(lambda chosen: measure_auc(own[chosen], contrast[chosen]), len(pairs))
    return JudgeQuality(measure_auc(own, contrast), ends, len(pairs))


def measure_auc(own: Floats, contrast: Floats) -> float:
    """The share of all (own, contrast) with the larger score on the own side; a tie counts half."""
    above = own[:, None] - contrast[None, :]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def _vectorise(texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Texts as bags for `embedding_bag`: indices [n-grams], values [n-grams], offsets [texts]."""
    indices: list[int] = []
    values: list[float] = []
    offsets: list[int] = []
    for text in texts:
        bag = {gram: 1 + math.log(count) for gram, count in Counter(_hash(gram) for gram in _list_grams(text)).items()}
        norm = math.sqrt(sum(value * value for value in bag.values()))
        offsets.append(len(indices))
        indices += bag
        values += [value / norm for value in bag.values()]
    found: tuple[Any, ...] = (torch.tensor(indices, dtype=torch.long), torch.tensor(values), torch.tensor(offsets))
    return found[0], found[1], found[2]


def _list_grams(text: str) -> list[str]:
    """Words, pairs of words, and n-grams of characters within a word and its spaces."""
    words = _WORD.findall(text.lower())
    spaced = [f" {word} " for word in words]
    letters = [word[i : i + size] for word in spaced for size in _LETTERS for i in range(len(word) - size + 1)]
    return [*(f"w{word}" for word in words), *(f"w{a} {b}" for a, b in pairwise(words)), *letters]


def _hash(gram: str) -> int:
    return zlib.crc32(gram.encode()) % _BUCKETS  # Python's own hash differs from process to process
