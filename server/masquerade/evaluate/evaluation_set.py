"""Held-out texts of two opposites and neutral text, and the figures that a treatment's likelihoods give on them."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masquerade.evaluate.bootstrap import Floats, mean_interval, median_interval, ratio_interval, share_interval
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import exponential, read_divergence, read_likelihoods
from masquerade.evaluate.repetition import share_looping
from masquerade.evaluate.splits import match
from masquerade.evaluate.stored_prompts import StoredPrompts
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base


@dataclass(frozen=True, eq=False)
class LogLikelihoods:
    """Log-likelihoods of some texts' responses, and their lengths in tokens."""

    nats: Floats
    tokens: Floats

    @property
    def mean(self) -> Floats:
        """Nats a token, by text."""
        return self.nats / self.tokens


@dataclass(frozen=True, eq=False)
class SetLikelihoods:
    """Log-likelihoods of an evaluation set under one treatment, by side (1, -1, and 0 for neutral text)."""

    sides: dict[int, LogLikelihoods]

    def margins(self, pairs: Sequence[tuple[int, int]], side: int) -> Floats:
        """By how many nats a token each pair's answer of `side` is more likely than the opposite's."""
        own, contrast = self.sides[1].mean, self.sides[-1].mean
        return side * np.array([own[i] - contrast[j] for i, j in pairs])

    def first(self, most: int) -> SetLikelihoods:
        """Those of the first texts of each side, at most `most`."""
        return SetLikelihoods(
            {side: LogLikelihoods(one.nats[:most], one.tokens[:most]) for side, one in self.sides.items()}
        )


class EvaluationSet:
    """Texts of a persona (side 1), of its opposite (side -1; may be empty) and neutral texts (side 0; may be empty)."""

    def __init__(
        self, base: Base, own: Sequence[Encoded], contrast: Sequence[Encoded], neutral: Sequence[Encoded]
    ) -> None:
        self._base = base
        self.texts = {1: list(own), -1: list(contrast), 0: list(neutral)}
        self.pairs = match(own, contrast)
        self._prompts = StoredPrompts(base)
        self._base_likelihoods: SetLikelihoods | None = None
        self._base_looping: dict[tuple[int, int], float] = {}  # by the most prompts and tokens

    def measure(self, treatment: Treatment, only: Sequence[int] = (1, -1, 0)) -> Generator[None, None, SetLikelihoods]:
        """The likelihoods of all texts, or `only` of some sides, under a treatment; a work item is a micro-batch."""
        sides = {}
        if treatment.leaves_prompts:
            yield from self._prompts.store(treatment.rewrite(one) for side in only for one in self.texts[side])
        for side in only:
            found = yield from read_likelihoods(self._base, self.texts[side], treatment, self._prompts)
            sides[side] = LogLikelihoods(
                np.array([one.log for one in found]), np.array([one.tokens for one in found], dtype=float)
            )
        return SetLikelihoods(sides)

    def measure_base(self) -> Generator[None, None, SetLikelihoods]:
        """The likelihoods under the base alone; computed once."""
        if self._base_likelihoods is None:
            self._base_likelihoods = yield from self.measure(UNTREATED)
        return self._base_likelihoods

    def measure_divergence(self, treatment: Treatment) -> Generator[None, None, float]:
        """KL(base ‖ treated) of the next token of the neutral texts, mean nats; see `read_divergence`."""
        return (yield from read_divergence(self._base, self.texts[0], treatment, self._prompts))

    def measure_ratio(self, treatment: Treatment, side: int) -> Generator[None, None, float]:
        """The perplexity of a side's text with a treatment over the perplexity without; 0 is neutral text."""
        base = yield from self.measure_base()
        treated = yield from self.measure(treatment, only=(side,))
        return round(_ratio(base.sides[side], treated.sides[side]), 4)

    def first(self, most: int) -> EvaluationSet:
        """The first texts of each side, at most `most`."""
        found = EvaluationSet(self._base, *(self.texts[side][:most] for side in (1, -1, 0)))
        found._prompts = self._prompts
        return found

    def prompts(self, most: int) -> list[Encoded]:
        """At most `most` different prompts of both sides. Plain text has none."""
        return self._find_prompts((1, -1))[:most]

    def _find_prompts(self, sides: Sequence[int]) -> list[Encoded]:
        prompts = dict.fromkeys(one.prompt for side in sides for one in self.texts[side] if len(one.prompt) > 1)
        return [Encoded(prompt, ()) for prompt in prompts]

    def measure_looping(self, treatment: Treatment, most: int, tokens: int) -> Generator[None, None, float]:
        """The share of greedy answers of at most `tokens` tokens that loop; 0 without prompts.

        They are to at most `most` prompts of the sides and as many neutral ones. The base's is computed once.
        """
        if treatment is UNTREATED and (most, tokens) in self._base_looping:
            return self._base_looping[most, tokens]
        prompts = self.prompts(most) + self._find_prompts((0,))[:most]
        texts = yield from write_answers(self._base, prompts, treatment, GenerationParams(tokens))
        share = share_looping(texts)
        if treatment is UNTREATED:
            self._base_looping[most, tokens] = share
        return share

    def figures(
        self, side: int, base: SetLikelihoods, masked: SetLikelihoods, opposite: SetLikelihoods | None = None
    ) -> dict[str, Any]:
        """What a mask changes for `side`, given the likelihoods with the mask and without.

        `own_ratio`, `neutral_ratio`: perplexity with the mask over perplexity without. Texts whose response is shorter
        with the mask, as a longer prompt leaves no room, count in no figure. With pairs also: `pairs`,
        `margin_shift` and `margin_shift_median` in nats a token, `preferred` (share of pairs whose own answer is more
        likely, base and masked) and, with the likelihoods under the opposite's mask, `flip`.
        """
        found: dict[str, Any] = {"own_ratio": _ratio(base.sides[side], masked.sides[side])}
        if self.texts[0]:
            found["neutral_ratio"] = _ratio(base.sides[0], masked.sides[0])
        if pairs := self.find_whole_pairs(base, masked, opposite):
            before, after = base.margins(pairs, side), masked.margins(pairs, side)
            found["pairs"] = len(pairs)
            found["margin_shift"] = float((after - before).mean())
            found["margin_shift_median"] = float(np.median(after - before))
            found["preferred"] = {"base": float((before > 0).mean()), "masked": float((after > 0).mean())}
            if opposite is not None:
                found["flip"] = float(((after > 0) & (opposite.margins(pairs, side) < 0)).mean())
        return rounded(found)

    def find_whole_pairs(self, base: SetLikelihoods, *treated: SetLikelihoods | None) -> list[tuple[int, int]]:
        """The pairs without a response that a longer prompt of some treatment has cut."""
        whole = {
            side: np.all([find_whole(base.sides[side], one.sides[side]) for one in treated if one], axis=0)
            for side in (1, -1)
        }
        return [(i, j) for i, j in self.pairs if whole[1][i] and whole[-1][j]]

    def intervals(
        self,
        side: int,
        base: SetLikelihoods,
        masked: SetLikelihoods,
        opposite: SetLikelihoods | None = None,
        seed: int = 0,
    ) -> dict[str, tuple[float, float]]:
        """95 % intervals of the `figures`: Wilson's for shares of pairs, else the bootstrap's over pairs or texts."""
        found = {"own_ratio": _ratio_interval(base.sides[side], masked.sides[side], seed)}
        if self.texts[0]:
            found["neutral_ratio"] = _ratio_interval(base.sides[0], masked.sides[0], seed)
        if pairs := self.find_whole_pairs(base, masked, opposite):
            before, after = base.margins(pairs, side), masked.margins(pairs, side)
            found["margin_shift"] = mean_interval(after - before, seed)
            found["margin_shift_median"] = median_interval(after - before, seed)
            found["preferred"] = share_interval(int((after > 0).sum()), len(pairs))
            if opposite is not None:
                flipped = (after > 0) & (opposite.margins(pairs, side) < 0)
                found["flip"] = share_interval(int(flipped.sum()), len(pairs))
        return found


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Numbers to four decimals; NaN and infinity, which JSON does not have, become None."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return rounded(value)
        if isinstance(value, list):
            return [shorten(one) for one in value]
        if isinstance(value, float):
            return round(value, 4) if math.isfinite(value) else None
        return value

    return {name: shorten(value) for name, value in figures.items()}


def find_whole(base: LogLikelihoods, masked: LogLikelihoods) -> NDArray[np.bool_]:
    """Which responses are as long as the base's: no longer prompt has cut them."""
    whole: NDArray[np.bool_] = base.tokens == masked.tokens
    return whole


def _ratio(base: LogLikelihoods, masked: LogLikelihoods) -> float:
    whole = find_whole(base, masked)
    if not whole.any():
        return math.nan
    return exponential(float((base.nats - masked.nats)[whole].sum() / base.tokens[whole].sum()))


def _ratio_interval(base: LogLikelihoods, masked: LogLikelihoods, seed: int) -> tuple[float, float]:
    whole = find_whole(base, masked)
    if not whole.any():
        return -math.inf, math.inf
    return ratio_interval(base.nats[whole], masked.nats[whole], base.tokens[whole], seed)
