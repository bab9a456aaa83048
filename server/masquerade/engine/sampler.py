"""The sampler: from the logits of a batch to its next tokens.

A row's token depends only on that row's logits, its request's tokens and its request's random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from masquerade.engine.request import Request

MAX_CANDIDATES = 256  # a truncated draw looks at so many of the most likely tokens before it sorts the whole row
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny  # a lower one would be 0 in fp32, which is greedy

Columns = dict[str, Tensor]  # [rows, 1] each
Draw = Callable[[Tensor, Tensor, Columns], Tensor]


class SampledToken(NamedTuple):
    """A sampled token; None if the logits are not finite. `logprob` and `top` are set where requested."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SampledRow(NamedTuple):
    """A row to sample from: the request's next token, or the one after a draft of the next ones."""

    request: Request
    draft: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplingMetadata:
    """The sampling parameters of a batch's requests as tensors, which are kept while the batch stays the same."""

    requests: list[Request]  # by row
    penalty_rows: list[int]
    biases: tuple[Tensor, Tensor, Tensor] | None  # rows, tokens, bias
    grammar_rows: list[int]
    min_tokens_rows: list[int]
    draws: list[tuple[Draw, list[int], Columns]]  # method, rows, parameters of these rows
    logprob_rows: list[int]
    penalties: Columns  # of the penalty rows

    @property
    def changes_logits(self) -> bool:
        """Whether any row's logits are changed before sampling."""
        return bool(self.penalty_rows or self.biases or self.grammar_rows or self.min_tokens_rows)


class Sampler:
    """Samples tokens. Keeps the metadata of the last batch, and the token counts of requests with penalties."""

    def __init__(self) -> None:
        self._metadata: SamplingMetadata | None = None
        self._token_counts: WeakKeyDictionary[Request, TokenCounts] = WeakKeyDictionary()

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """The next token of each request. The logits are [requests, vocabulary] in any float dtype; they are not
        changed.
        """
        return self.sample_rows(logits, [SampledRow(request) for request in requests])

    def sample_rows(self, logits: Tensor, rows: Sequence[SampledRow]) -> list[SampledToken]:
        """The token of each row: what `sample` returns for its request once the row's draft is part of the answer. The
        logits are [rows, vocabulary].
        """
        requests = [row.request for row in rows]
        if self._metadata is None or self._metadata.requests != requests:
            self._metadata = make_metadata(requests, logits.shape[-1], logits.device)
        return self._sample(logits, self._metadata, [row.draft for row in rows])

    def _sample(self, raw: Tensor, metadata: SamplingMetadata, drafts: Sequence[tuple[int, ...]]) -> list[SampledToken]:
        logits = self._process(raw.float().clone(), metadata, drafts) if metadata.changes_logits else raw
        tokens, finite = _find_best(logits)
        for draw, rows, columns in metadata.draws:
            uniform = [[metadata.requests[row].draw(len(drafts[row]))] for row in rows]
            tokens[rows] = draw(logits[rows].float(), torch.tensor(uniform, device=raw.device), columns)
        ids: list[int] = tokens.masked_fill(~finite, -1).tolist()  # one copy from a device, which is waited for
        sampled = [SampledToken(token if token >= 0 else None) for token in ids]
        if metadata.logprob_rows:
            _add_logprobs(raw, metadata, sampled)
        return sampled

    def _process(self, logits: Tensor, metadata: SamplingMetadata, drafts: Sequence[tuple[int, ...]]) -> Tensor:
        """Apply penalties, biases, minimum lengths and grammars to the logits, in place where possible."""
        if metadata.penalty_rows:
            rows = metadata.penalty_rows
            counts = [self._update_counts(metadata.requests[row], logits).after(drafts[row]) for row in rows]
            logits[rows] = _penalise(logits[rows], counts, metadata.penalties)
        if metadata.biases:
            at_rows, at_tokens, bias = metadata.biases
            logits.index_put_((at_rows, at_tokens), bias, accumulate=True)
        for row in metadata.min_tokens_rows:
            request = metadata.requests[row]
            if request.num_output_tokens + len(drafts[row]) < request.min_tokens:
                logits[row, list(request.ends)] = float("-inf")
        for row in metadata.grammar_rows:
            request = metadata.requests[row]
            assert request.grammar is not None
            request.grammar.allow(logits[row])
        return logits

    def _update_counts(self, request: Request, logits: Tensor) -> TokenCounts:
        counts = self._token_counts.get(request)
        if counts is None:
            counts = self._token_counts[request] = TokenCounts(request, logits)
        counts.update(request)
        return counts


class TokenCounts:
    """How often each token occurs in a request's output, and whether it occurs in prompt or output: [vocabulary].

    Holds no reference to the request, so that the sampler's weak dictionary can drop both.
    """

    def __init__(self, request: Request, logits: Tensor) -> None:
        self._counted = len(request.prompt)
        self.output = torch.zeros_like(logits[0])
        self.seen = torch.zeros_like(logits[0], dtype=torch.bool)
        self.seen[request.prompt] = True

    def after(self, tokens: Sequence[int]) -> TokenCounts:
        """The counts with more tokens in the output; those of the request itself if there are none."""
        if not tokens:
            return self
        more = copy(self)
        more.output, more.seen = self.output.clone(), self.seen.clone()
        more._add(tokens)
        return more

    def update(self, request: Request) -> None:
        """Count the output since the last call."""
        self._add(request.ids[self._counted :])
        self._counted = len(request.ids)

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.output[token] += 1
            self.seen[token] = True


def make_metadata(requests: Sequence[Request], vocabulary: int, device: torch.device) -> SamplingMetadata:
    """Group a batch's rows by their sampling parameters."""
    samplings = [request.sampling for request in requests]

    def rows(*holds: bool) -> list[int]:
        return [row for row, true in enumerate(holds) if true]

    def columns(rows: list[int], names: tuple[str, ...]) -> Columns:
        return {n: torch.tensor([[float(getattr(samplings[row], n))] for row in rows], device=device) for n in names}

    biases = [(row, token, bias) for row, how in enumerate(samplings) for token, bias in how.bias.items()]
    truncated = [0 < how.top_k < vocabulary or how.top_p < 1 or how.min_p > 0 for how in samplings]
    random = [how.temperature >= MIN_TEMPERATURE for how in samplings]
    penalty_rows = rows(*(how.has_penalties for how in samplings))
    draws: list[tuple[Draw, list[int]]] = [
        (_draw_full, rows(*(drawn and not cut for drawn, cut in zip(random, truncated, strict=True)))),
        (_draw_truncated, rows(*(drawn and cut for drawn, cut in zip(random, truncated, strict=True)))),
    ]
    return SamplingMetadata(
        list(requests),
        penalty_rows,
        tuple(torch.tensor(part, device=device) for part in zip(*biases, strict=True)) if biases else None,  # type: ignore[arg-type]
        rows(*(request.grammar is not None for request in requests)),
        rows(*(request.min_tokens > 0 and bool(request.ends) for request in requests)),
        [(draw, some, columns(some, ("temperature", "top_p", "top_k", "min_p"))) for draw, some in draws if some],
        rows(*(how.logprobs is not None for how in samplings)),
        columns(penalty_rows, ("repetition_penalty", "presence_penalty", "frequency_penalty")),
    )


def _find_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of every row, and whether its logit is finite: nan compares as the largest, and a grammar
    may forbid every token. On a CPU, numpy's search is vectorised and torch's is not; half precision is exact in fp32.
    """
    if logits.device.type != "cpu":
        best, order = logits.max(-1)
        return order, best.isfinite()
    rows = logits.float().numpy()
    tokens = rows.argmax(-1)
    finite = np.isfinite(rows[np.arange(len(rows)), tokens])
    return torch.from_numpy(tokens), torch.from_numpy(finite)


def _penalise(logits: Tensor, token_counts: Sequence[TokenCounts], columns: Columns) -> Tensor:
    """Repetition as in Keskar et al. 2019, presence and frequency as OpenAI documents them."""
    counts = torch.stack([counts.output for counts in token_counts])  # [rows, vocabulary]
    seen = torch.stack([counts.seen for counts in token_counts])
    repetition = columns["repetition_penalty"]
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - columns["frequency_penalty"] * counts - columns["presence_penalty"] * (counts > 0)


def _probabilities(logits: Tensor, columns: Columns) -> Tensor:
    return ((logits - logits.amax(-1, keepdim=True)) / columns["temperature"]).softmax(-1)


def _draw_full(logits: Tensor, uniform: Tensor, columns: Columns) -> Tensor:
    """Inverse transform sampling over the whole vocabulary, in its order."""
    cumulative = _probabilities(logits, columns).double().cumsum(-1)
    token = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    # Rounding must not lead beyond the last token with a positive probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return token.minimum(last).squeeze(-1)


def _draw_truncated(logits: Tensor, uniform: Tensor, columns: Columns) -> Tensor:
    """Sampling with top_k, top_p and min_p from the `MAX_CANDIDATES` most likely tokens. Rows that need more are sorted
    as a whole.
    """
    probability = _probabilities(logits, columns)
    width = min(MAX_CANDIDATES, logits.shape[-1])
    best, order = probability.topk(width)
    tokens = order.gather(-1, _draw_rank(best, uniform, columns)).squeeze(-1)
    top_k = columns["top_k"]
    enough = (width == logits.shape[-1]) | ((top_k > 0) & (top_k <= width))
    enough |= (columns["top_p"] < 1) & (top_k == 0) & (best.sum(-1, keepdim=True) >= columns["top_p"])
    enough |= (top_k == 0) & (best[:, -1:] < columns["min_p"] * best[:, :1])
    few = (~enough.squeeze(-1)).nonzero().squeeze(-1)
    if len(few):
        probability = probability[few]
        ranked = _sort(probability)
        rank = _draw_rank(ranked, uniform[few], {name: c[few] for name, c in columns.items()})
        tokens[few] = _find_ranked(probability, ranked, rank)
    return tokens


def _sort(probability: Tensor) -> Tensor:
    """Every row in descending order. Sorting values without their indices is much faster, with numpy most of all."""
    if probability.device.type == "cpu":
        return torch.from_numpy(np.sort(probability.numpy(), -1)[:, ::-1].copy())
    return probability.sort(dim=-1, descending=True).values


def _find_ranked(probability: Tensor, ranked: Tensor, rank: Tensor) -> Tensor:
    """The tokens [rows] at ranks [rows, 1]; ties rank in the vocabulary's order."""
    value = ranked.gather(-1, rank)
    earlier = rank - (ranked > value).sum(-1, keepdim=True)  # rank among ties
    return torch.searchsorted((probability == value).cumsum(-1), earlier + 1).squeeze(-1)


def _draw_rank(probability: Tensor, uniform: Tensor, columns: Columns) -> Tensor:
    """Sample a rank, [rows, 1], from probabilities in descending order, after top_k, top_p of the rest, and min_p."""
    top_k = columns["top_k"]
    rank = torch.arange(probability.shape[-1], device=probability.device)
    probability = probability * ((top_k == 0) | (rank < top_k))
    # Without top_k the mass is 1, however many of the tokens are given.
    mass = torch.where(top_k > 0, probability.sum(-1, keepdim=True), 1.0)
    before = (probability.cumsum(-1) - probability) / mass  # mass of all more likely tokens
    probability = probability * (before < columns["top_p"]) * (probability >= columns["min_p"] * probability[:, :1])
    cumulative = probability.double().cumsum(-1)
    drawn = (cumulative <= uniform.double() * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = (probability > 0).sum(-1, keepdim=True) - 1  # rounding must not lead to a truncated token
    return drawn.minimum(last).clamp(min=0)  # a row of NaN has no positive probability


def _add_logprobs(raw: Tensor, metadata: SamplingMetadata, sampled: list[SampledToken]) -> None:
    """Add log probabilities of the model's own distribution to the tokens of rows that request them."""
    rows = [row for row in metadata.logprob_rows if sampled[row].token is not None]
    if not rows:
        return
    logprobs = raw[rows].float().log_softmax(-1)
    chosen = torch.tensor([[sampled[row].token] for row in rows], device=raw.device)
    own = logprobs.gather(-1, chosen).squeeze(-1).tolist()
    most = max(metadata.requests[row].sampling.logprobs or 0 for row in rows)
    values, tokens = (part.tolist() for part in logprobs.topk(min(most, raw.shape[-1])))
    for place, row in enumerate(rows):
        count = metadata.requests[row].sampling.logprobs or 0
        top = tuple(zip(tokens[place][:count], values[place][:count], strict=True))
        sampled[row] = SampledToken(sampled[row].token, own[place], top)
