"""The held-out text of two sides and neutral text, and what treatments do to it.

Knows how likelihoods become a mask's figures, with intervals. Refuses to know which treatment should win and what is
done about it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from masquerade.evaluate.bootstrap import Floats, mean_interval, ratio_interval, share_interval
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.metrics import exponential, read_likelihoods
from masquerade.evaluate.splits import match
from masquerade.evaluate.treatment import BARE, Treatment
from masquerade.model import Base

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Logs:
    """Log-likelihoods of some texts' responses, and their lengths in tokens."""

    nats: Floats
    tokens: Floats

    @property
    def mean(self) -> Floats:
        """Nats a token, by text."""
        return self.nats / self.tokens


@dataclass(frozen=True, eq=False)
class Reading:
    """How likely a treated base finds a panel's texts, by side (1 and -1), and neutral text (0)."""

    logs: dict[int, Logs]

    def margins(self, pairs: Sequence[tuple[int, int]], sign: int) -> Floats:
        """By how many nats a token each pair's answer of the side is preferred to the other's."""
        own, contrast = self.logs[1].mean, self.logs[-1].mean
        return sign * np.array([own[i] - contrast[j] for i, j in pairs])


class Panel:
    """Texts that judge masks: of a persona (1), of its opposite (-1; may be empty), and neutral ones (0)."""

    def __init__(
        self, base: Base, own: Sequence[Encoded], contrast: Sequence[Encoded], neutral: Sequence[Encoded]
    ) -> None:
        self._base = base
        self.texts = {1: list(own), -1: list(contrast), 0: list(neutral)}
        self.pairs = match(own, contrast)
        self._bare: Reading | None = None

    def read(self, treatment: Treatment) -> Generator[None, None, Reading]:
        """Measure; a work item a micro-batch."""
        logs = {}
        for sign, texts in self.texts.items():
            found = yield from read_likelihoods(self._base, texts, treatment)
            logs[sign] = Logs(
                np.array([one.log for one in found]), np.array([one.tokens for one in found], dtype=float)
            )
        return Reading(logs)

    def bare(self) -> Generator[None, None, Reading]:
        """The base's reading; measured once."""
        if self._bare is None:
            self._bare = yield from self.read(BARE)
        return self._bare

    def figures(self, sign: int, bare: Reading, worn: Reading, against: Reading | None = None) -> dict[str, Any]:
        """What wearing a mask does, as the side `sign` sees it.

        `own_ratio`, `neutral_ratio`: perplexity with the mask over perplexity without. Where pairs are: `pairs`,
        `margin_shift` in nats a token, `preferred` (share of pairs whose own answer wins, base and masked) and, with
        the opposite's reading `against`, `flip`.
        """
        found: dict[str, Any] = {"own_ratio": _ratio(bare.logs[sign], worn.logs[sign])}
        if self.texts[0]:
            found["neutral_ratio"] = _ratio(bare.logs[0], worn.logs[0])
        if self.pairs:
            before, after = bare.margins(self.pairs, sign), worn.margins(self.pairs, sign)
            found["pairs"] = len(self.pairs)
            found["margin_shift"] = float((after - before).mean())
            found["preferred"] = {"base": float((before > 0).mean()), "masked": float((after > 0).mean())}
            if against is not None:
                found["flip"] = float(((after > 0) & (against.margins(self.pairs, sign) < 0)).mean())
        return rounded(found)

    def intervals(
        self, sign: int, bare: Reading, worn: Reading, against: Reading | None = None, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """95 % intervals of the `figures`: Wilson's of shares of pairs, else of the bootstrap over pairs and texts."""
        found = {"own_ratio": _ratio_interval(bare.logs[sign], worn.logs[sign], seed)}
        if self.texts[0]:
            found["neutral_ratio"] = _ratio_interval(bare.logs[0], worn.logs[0], seed)
        if self.pairs:
            before, after = bare.margins(self.pairs, sign), worn.margins(self.pairs, sign)
            found["margin_shift"] = mean_interval(after - before, seed)
            found["preferred"] = share_interval(int((after > 0).sum()), len(self.pairs))
            if against is not None:
                flipped = (after > 0) & (against.margins(self.pairs, sign) < 0)
                found["flip"] = share_interval(int(flipped.sum()), len(self.pairs))
        return found


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """To four decimals, and what is not finite as None, as JSON has it."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return rounded(value)
        if isinstance(value, list):
            return [shorten(one) for one in value]
        if isinstance(value, float):
            return round(value, 4) if math.isfinite(value) else None
        return value

    return {name: shorten(value) for name, value in figures.items()}


def _ratio(bare: Logs, worn: Logs) -> float:
    return exponential(float((bare.nats - worn.nats).sum() / bare.tokens.sum()))


def _ratio_interval(bare: Logs, worn: Logs, seed: int) -> tuple[float, float]:
    return ratio_interval(bare.nats, worn.nats, bare.tokens, seed)
