"""Log-likelihoods of responses under a treatment, and the shares, ratios and divergences computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, MicroBatch, batches
from masquerade.evaluate.paged import find_native_stack
from masquerade.evaluate.prefix import count_shared, extend, repeat
from masquerade.evaluate.scorer import PagedScorer, Predictions
from masquerade.evaluate.stored_prompts import StoredPrompts
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.kernels import divergences, log_probabilities
from masquerade.model import Base, NativeStack, NotNative, Span, make_route

T = TypeVar("T")
Items = Generator[None, None, T]  # yields after each work item, returns the result


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one response."""

    log: float  # sum over the response's tokens, nats
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.log / self.tokens


def finish(work: Generator[Any, None, T], report: Callable[[], None] = lambda: None) -> T:
    """Run all work items, and call `report` after each; returns the result."""
    while True:
        try:
            next(work)
            report()
        except StopIteration as end:
            result: T = end.value
            return result


def likelihoods(base: Base, examples: Sequence[Encoded], treatment: Treatment = UNTREATED) -> list[Likelihood]:
    """`read_likelihoods`, run to its end."""
    return finish(read_likelihoods(base, examples, treatment))


@torch.no_grad()
def read_likelihoods(
    base: Base,
    examples: Sequence[Encoded],
    treatment: Treatment = UNTREATED,
    stored: StoredPrompts | None = None,
) -> Items[list[Likelihood]]:
    """The likelihood of each example's response, in the examples' order; a work item is a micro-batch.

    The base must have its masks attached. `stored` is as in `predict`.
    """
    found: dict[int, Likelihood] = {}
    for part in predict(base, [treatment.rewrite(example) for example in examples], treatment, stored):
        chosen = log_probabilities(part.logits, part.following).double()
        sums = [float(one.sum()) for one in torch.split(chosen, list(part.counts))]
        for index, log, tokens in zip(part.index, sums, part.counts, strict=True):
            found[index] = Likelihood(log, tokens)
        yield
    return [found[index] for index in range(len(examples))]


def divergence(base: Base, examples: Sequence[Encoded], treatment: Treatment) -> float:
    """`read_divergence`, run to its end."""
    return finish(read_divergence(base, examples, treatment))


@torch.no_grad()
def read_divergence(
    base: Base, examples: Sequence[Encoded], treatment: Treatment, stored: StoredPrompts | None = None
) -> Items[float]:
    """KL(base ‖ treated) of the next token, mean nats over the tokens of the responses.

    A micro-batch is two work items, one without the treatment and one with it. Prompts are not rewritten. `stored` is
    as in `predict`.
    """
    total, tokens = 0.0, 0
    if not treatment.leaves_prompts:
        stored = None  # both must have the same micro-batches
    predicts = predict if find_native_stack(base, treatment) is not None else _predict_padded
    treated = predicts(base, examples, treatment, stored)
    for untreated in predicts(base, examples, UNTREATED, stored):
        yield
        found = divergences(untreated.logits, next(treated).logits)
        total += float(found.double().sum())
        tokens += len(found)
        yield
    return total / tokens


def perplexity(likelihoods: Sequence[Likelihood]) -> float:
    """exp of the negative mean log-likelihood a token."""
    return exponential(-sum(one.log for one in likelihoods) / sum(one.tokens for one in likelihoods))


def exponential(nats: float) -> float:
    """exp(nats); infinity where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def margins(own: Sequence[Likelihood], contrast: Sequence[Likelihood]) -> list[float]:
    """By how many nats a token each own answer is more likely than the contrast's to the same prompt."""
    return [mine.mean - theirs.mean for mine, theirs in zip(own, contrast, strict=True)]


def flips(own: Sequence[float], contrast: Sequence[float]) -> float:
    """Share of prompts whose own answer is the likelier one under the own mask, and not under the contrast's.

    Both arguments are margins (own minus contrast answer): under the own mask, and under the contrast's mask.
    """
    pairs = list(zip(own, contrast, strict=True))
    return sum(mine > 0 > theirs for mine, theirs in pairs) / len(pairs)


def preferred(margins: Sequence[float]) -> float:
    """Share of prompts whose own answer is the likelier one: the paper's accuracy of a two-way choice."""
    return sum(margin > 0 for margin in margins) / len(margins)


def predict(
    base: Base, examples: Sequence[Encoded], treatment: Treatment, stored: StoredPrompts | None = None
) -> Iterator[Predictions]:
    """Predictions of all responses in micro-batches, natively where possible.

    Prompts are not computed again if `stored` has them and the treatment leaves them to the base. The base must have
    its masks attached.
    """
    if (stack := find_native_stack(base, treatment)) is not None:
        with suppress(NotNative):  # which the first pass raises, if any
            yield from _predict_natively(base, examples, treatment, stored, stack)
            return
    yield from _predict_padded(base, examples, treatment, stored)


def _predict_natively(
    base: Base, examples: Sequence[Encoded], treatment: Treatment, stored: StoredPrompts | None, stack: NativeStack
) -> Iterator[Predictions]:
    """Rows are packed, and a row's predictions are the same in any composition."""
    scorers = stored.find_scorers(examples) if stored is not None and treatment.leaves_prompts else []
    for scorer, index in scorers or _make_scorers(base, examples, treatment, stack):
        for part in scorer.predict([examples[at] for at in index], treatment):
            logits = treatment.shift(part.logits) if treatment.shift else part.logits
            yield replace(part, index=[index[at] for at in part.index], logits=logits)


def _make_scorers(
    base: Base, examples: Sequence[Encoded], treatment: Treatment, stack: NativeStack
) -> Iterator[tuple[PagedScorer, list[int]]]:
    """What has read the prompts of some examples under a treatment, and which these are."""
    for batch in batches(examples, torch.device("cpu")):
        some = [examples[at] for at in batch.index]
        prompts, longest = list(dict.fromkeys(one.prompt for one in some)), max(len(one.response) for one in some)
        scorer = PagedScorer(base, prompts, treatment, longest, stack)
        for _ in scorer.read_prompts():
            pass
        yield scorer, list(batch.index)


def _predict_padded(
    base: Base, examples: Sequence[Encoded], treatment: Treatment, stored: StoredPrompts | None = None
) -> Iterator[Predictions]:
    """Micro-batches are padded, and transformers computes them."""
    held = stored is not None and treatment.leaves_prompts and stored.hold(examples)
    past: _Past = _StoredPast(stored, examples) if stored and held else _SharedPast(base, examples, treatment)
    for batch in batches(past.rest, base.device, past.most):
        route = make_route(find_spans(batch, past.rest, treatment))
        with treatment.around(), _head_at(base, batch.predicts):
            logits = base.model(input_ids=batch.ids, **past.attach(batch), route=route).logits[0]
        shifted = treatment.shift(logits) if treatment.shift else logits
        counts = batch.predicts.sum(1).tolist()
        yield Predictions(batch.index, shifted, batch.ids.roll(-1, 1)[batch.predicts], counts)


class _Past(Protocol):
    """What precedes the tokens that are computed."""

    rest: Sequence[Encoded]  # the examples without it
    most: int  # padded tokens of a micro-batch

    def attach(self, batch: MicroBatch) -> dict[str, Any]:
        """What the model is called with beside a micro-batch's ids."""


class _SharedPast:
    """What all prompts begin with, computed when this is made."""

    def __init__(self, base: Base, examples: Sequence[Encoded], treatment: Treatment) -> None:
        shared = count_shared([example.prompt for example in examples])
        self.rest: Sequence[Encoded] = [replace(one, prompt=one.prompt[shared:]) for one in examples]
        self.most, self._prefix = BATCH_TOKENS - shared, DynamicCache(config=base.model.config)
        if shared:
            extend(base, self._prefix, examples[0].prompt[:shared], treatment)

    def attach(self, batch: MicroBatch) -> dict[str, Any]:
        if not self._prefix.get_seq_length():
            return {"use_cache": False}
        return {"past_key_values": repeat(self._prefix, len(batch.ids)), "use_cache": True}


class _StoredPast:
    """All of each prompt but its last token."""

    def __init__(self, stored: StoredPrompts, examples: Sequence[Encoded]) -> None:
        self._stored, self._examples, self.most = stored, examples, BATCH_TOKENS
        self.rest: Sequence[Encoded] = [replace(example, prompt=example.prompt[-1:]) for example in examples]

    def attach(self, batch: MicroBatch) -> dict[str, Any]:
        return self._stored.attach([self._examples[index] for index in batch.index], batch.ids.shape[1])


@contextmanager
def _head_at(base: Base, positions: Tensor) -> Iterator[None]:
    """Within the context, the LM head gets the hidden states at some positions only, as a single row.

    With a large vocabulary the head takes a fifth of a small model's time, and its logits most of the memory.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][positions].unsqueeze(0),)

    handle = base.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def find_spans(batch: MicroBatch, examples: Sequence[Encoded], treatment: Treatment) -> list[Span]:
    """The positions that the mask applies to.

    Attention is causal, so unmasked prompt positions have the base's keys and values, as if they were computed before.
    """
    if treatment.applied is None:
        return []
    if treatment.phase == "all":
        return [Span(treatment.applied, 0, batch.ids.numel())]
    length = batch.ids.shape[1]
    return [
        Span(treatment.applied, row * length + len(examples[index].prompt) - 1, row * length + len(examples[index]))
        for row, index in enumerate(batch.index)
    ]
