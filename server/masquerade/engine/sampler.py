"""From logits to tokens, for a whole batch at once.

Knows penalties, truncations and the draw. Refuses to know where logits come from: a row's choice depends on that row's
logits, its request's own tokens and its request's own random number, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from masquerade.engine.request import Request

WIDE = 256  # so many of the likeliest tokens are looked at before a whole row is sorted
COLDEST = torch.finfo(torch.float32).tiny  # a temperature below it is 0 in a column, which is greedy


Columns = dict[str, Tensor]  # [rows, 1] each
Draw = Callable[[Tensor, Tensor, Columns], Tensor]


class SampledToken(NamedTuple):
    """A chosen token; None if the logits are no numbers. `logprob` and `top` where they were asked for."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Mix:
    """What the requests of a batch ask for, as columns; made once for a batch and used while it lasts."""

    requests: list[Request]
    penalised: list[int]  # rows
    biased: tuple[Tensor, Tensor, Tensor] | None  # rows, tokens, bias
    ruled: list[int]  # rows with a grammar
    short: list[int]  # rows with a least length
    draws: list[tuple[Draw, list[int], Columns]]  # how, rows, their columns
    reported: list[int]  # rows with log probabilities
    penalties: Columns  # of the penalised rows

    @property
    def alters(self) -> bool:
        """Whether any row's logits are changed before the choice."""
        return bool(self.penalised or self.biased or self.ruled or self.short)


class Sampler:
    """Chooses tokens. Keeps what repeats from step to step: the columns of the last batch, the tallies of requests."""

    def __init__(self) -> None:
        self._mix: Mix | None = None
        self._tallies: WeakKeyDictionary[Request, Tally] = WeakKeyDictionary()

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """The next token of each request; logits are [requests, vocabulary] in any float dtype, and are not changed."""
        if self._mix is None or self._mix.requests != requests:
            self._mix = mix(requests, logits.shape[-1], logits.device)
        return self._choose(logits, self._mix)

    def _choose(self, raw: Tensor, asked: Mix) -> list[SampledToken]:
        logits = self._alter(raw.float().clone(), asked) if asked.alters else raw
        tokens, sound = _find_best(logits)
        for draw, rows, columns in asked.draws:
            chance = [[asked.requests[row].draw()] for row in rows]
            tokens[rows] = draw(logits[rows].float(), torch.tensor(chance, device=raw.device), columns)
        ids: list[int] = tokens.tolist()
        picks = [SampledToken(token if fine else None) for token, fine in zip(ids, sound.tolist(), strict=True)]
        if asked.reported:
            _report(raw, asked, picks)
        return picks

    def _alter(self, logits: Tensor, asked: Mix) -> Tensor:
        if asked.penalised:
            rows = asked.penalised
            tallies = [self._tally(asked.requests[row], logits) for row in rows]
            logits[rows] = _penalise(logits[rows], tallies, asked.penalties)
        if asked.biased:
            at_rows, at_tokens, bias = asked.biased
            logits.index_put_((at_rows, at_tokens), bias, accumulate=True)
        for row in asked.short:
            request = asked.requests[row]
            if request.answered < request.min_tokens:
                logits[row, list(request.ends)] = float("-inf")
        for row in asked.ruled:
            request = asked.requests[row]
            assert request.grammar is not None
            request.grammar.allow(logits[row])
        return logits

    def _tally(self, request: Request, logits: Tensor) -> Tally:
        tally = self._tallies.get(request)
        if tally is None:
            tally = self._tallies[request] = Tally(request, logits)
        tally.advance(request)
        return tally


class Tally:
    """How often each token of the vocabulary occurs in a request's answer, and which ones in prompt or answer.

    It does not hold the request: it is kept for as long as that lives.
    """

    def __init__(self, request: Request, logits: Tensor) -> None:
        self._known = len(request.prompt)
        self.counts = torch.zeros_like(logits[0])
        self.seen = torch.zeros_like(logits[0], dtype=torch.bool)
        self.seen[request.prompt] = True

    def advance(self, request: Request) -> None:
        """Count what was said since the last time."""
        for token in request.ids[self._known :]:
            self.counts[token] += 1
            self.seen[token] = True
        self._known = len(request.ids)


def mix(requests: Sequence[Request], vocabulary: int, device: torch.device) -> Mix:
    """Sort a batch's rows by what they ask for."""
    samplings = [request.sampling for request in requests]

    def rows(*holds: bool) -> list[int]:
        return [row for row, true in enumerate(holds) if true]

    def columns(rows: list[int], names: tuple[str, ...]) -> Columns:
        return {n: torch.tensor([[float(getattr(samplings[row], n))] for row in rows], device=device) for n in names}

    biases = [(row, token, bias) for row, how in enumerate(samplings) for token, bias in how.bias.items()]
    narrow = [0 < how.top_k < vocabulary or how.top_p < 1 or how.min_p > 0 for how in samplings]
    hot = [how.temperature >= COLDEST for how in samplings]
    penalised = rows(*(how.penalises for how in samplings))
    draws: list[tuple[Draw, list[int]]] = [
        (_draw_plain, rows(*(warm and not cut for warm, cut in zip(hot, narrow, strict=True)))),
        (_draw_narrow, rows(*(warm and cut for warm, cut in zip(hot, narrow, strict=True)))),
    ]
    return Mix(
        list(requests),
        penalised,
        tuple(torch.tensor(part, device=device) for part in zip(*biases, strict=True)) if biases else None,  # type: ignore[arg-type]
        rows(*(request.grammar is not None for request in requests)),
        rows(*(request.min_tokens > 0 and bool(request.ends) for request in requests)),
        [(draw, some, columns(some, ("temperature", "top_p", "top_k", "min_p"))) for draw, some in draws if some],
        rows(*(how.logprobs is not None for how in samplings)),
        columns(penalised, ("repetition_penalty", "presence_penalty", "frequency_penalty")),
    )


def _find_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The token with the largest logit of every row, and whether that is a number: nan counts as larger than anything,
    and a grammar may leave nothing. numpy's search is vectorised.
    """
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        best, tokens = logits.max(-1)
        return tokens, best.isfinite()
    rows = logits.numpy()
    likeliest = rows.argmax(-1)
    sound = np.isfinite(rows[np.arange(len(rows)), likeliest])
    return torch.from_numpy(likeliest), torch.from_numpy(sound)


def _penalise(logits: Tensor, tallies: Sequence[Tally], columns: Columns) -> Tensor:
    """Repetition as in Keskar et al. 2019, presence and frequency as OpenAI documents them."""
    counts = torch.stack([tally.counts for tally in tallies])  # [rows, vocabulary]
    seen = torch.stack([tally.seen for tally in tallies])
    repetition = columns["repetition_penalty"]
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - columns["frequency_penalty"] * counts - columns["presence_penalty"] * (counts > 0)


def _probabilities(logits: Tensor, columns: Columns) -> Tensor:
    return ((logits - logits.amax(-1, keepdim=True)) / columns["temperature"]).softmax(-1)


def _draw_plain(logits: Tensor, chance: Tensor, columns: Columns) -> Tensor:
    """The inverse of the cumulative distribution, in the vocabulary's order."""
    reached = _probabilities(logits, columns).double().cumsum(-1)
    token = torch.searchsorted(reached, chance.double() * reached[:, -1:], right=True)
    # Rounding must not reach beyond the last token that has any probability.
    last = torch.searchsorted(reached, reached[:, -1:].contiguous())
    return token.minimum(last).squeeze(-1)


def _draw_narrow(logits: Tensor, chance: Tensor, columns: Columns) -> Tensor:
    """Truncated, from the likeliest tokens; of rows for which `WIDE` of them are too few, all are ranked."""
    probability = _probabilities(logits, columns)
    width = min(WIDE, logits.shape[-1])
    best, order = probability.topk(width)
    tokens = order.gather(-1, _draw_rank(best, chance, columns)).squeeze(-1)
    top_k = columns["top_k"]
    enough = (width == logits.shape[-1]) | ((top_k > 0) & (top_k <= width))
    enough |= (columns["top_p"] < 1) & (top_k == 0) & (best.sum(-1, keepdim=True) >= columns["top_p"])
    enough |= (top_k == 0) & (best[:, -1:] < columns["min_p"] * best[:, :1])
    few = (~enough.squeeze(-1)).nonzero().squeeze(-1)
    if len(few):
        probability = probability[few]
        ranked = _sort(probability)
        rank = _draw_rank(ranked, chance[few], {name: c[few] for name, c in columns.items()})
        tokens[few] = _find_ranked(probability, ranked, rank)
    return tokens


def _sort(probability: Tensor) -> Tensor:
    """Every row, the largest first. Without the order, which costs most: numpy sorts mere numbers in registers."""
    if probability.device.type == "cpu":
        return torch.from_numpy(np.sort(probability.numpy(), -1)[:, ::-1].copy())
    return probability.sort(dim=-1, descending=True).values


def _find_ranked(probability: Tensor, ranked: Tensor, rank: Tensor) -> Tensor:
    """The tokens [rows] at ranks [rows, 1]; of equally likely ones the first in the vocabulary ranks first."""
    value = ranked.gather(-1, rank)
    earlier = rank - (ranked > value).sum(-1, keepdim=True)  # among its equals
    return torch.searchsorted((probability == value).cumsum(-1), earlier + 1).squeeze(-1)


def _draw_rank(probability: Tensor, chance: Tensor, columns: Columns) -> Tensor:
    """top_k, then top_p of the rest, then min_p: the rank that is drawn, [rows, 1]; the likeliest come first."""
    top_k = columns["top_k"]
    rank = torch.arange(probability.shape[-1], device=probability.device)
    probability = probability * ((top_k == 0) | (rank < top_k))
    # Without top_k the mass is 1 and stays 1, however many of the tokens are at hand.
    mass = torch.where(top_k > 0, probability.sum(-1, keepdim=True), 1.0)
    before = (probability.cumsum(-1) - probability) / mass  # mass of all better tokens
    probability = probability * (before < columns["top_p"]) * (probability >= columns["min_p"] * probability[:, :1])
    reached = probability.double().cumsum(-1)
    place = (reached <= chance.double() * reached[:, -1:]).sum(-1, keepdim=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1  # rounding must not reach a token that was cut off
    return place.minimum(last).clamp(min=0)  # a row that is no numbers has none


def _report(raw: Tensor, asked: Mix, picks: list[SampledToken]) -> None:
    """Add log probabilities of the model's own distribution to the picks that want them."""
    rows = [row for row in asked.reported if picks[row].token is not None]
    if not rows:
        return
    logprobs = raw[rows].float().log_softmax(-1)
    chosen = torch.tensor([[picks[row].token] for row in rows], device=raw.device)
    own = logprobs.gather(-1, chosen).squeeze(-1).tolist()
    most = max(asked.requests[row].sampling.logprobs or 0 for row in rows)
    values, tokens = (part.tolist() for part in logprobs.topk(min(most, raw.shape[-1])))
    for place, row in enumerate(rows):
        count = asked.requests[row].sampling.logprobs or 0
        top = tuple(zip(tokens[place][:count], values[place][:count], strict=True))
        picks[row] = SampledToken(picks[row].token, own[place], top)
