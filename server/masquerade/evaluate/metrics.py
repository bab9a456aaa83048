"""Log-likelihoods of responses under a treatment, and the shares, ratios and divergences computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, MicroBatch, batches
from masquerade.evaluate.prefix import count_shared, extend, repeat
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, Span, make_route

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
    base: Base, examples: Sequence[Encoded], treatment: Treatment = UNTREATED
) -> Items[list[Likelihood]]:
    """The likelihood of each example's response, in the examples' order; a work item is a micro-batch.

    The base must have its masks attached.
    """
    found: dict[int, Likelihood] = {}
    for batch, logits in predict(base, [treatment.rewrite(example) for example in examples], treatment):
        chosen = log_probabilities(logits, batch.ids.roll(-1, 1)[batch.predicts]).double()
        rows, tokens = batch.predicts.nonzero()[:, 0], batch.predicts.sum(1).tolist()
        sums = chosen.new_zeros(len(tokens)).index_add(0, rows, chosen).tolist()
        found |= {
            index: Likelihood(*pair) for index, pair in zip(batch.index, zip(sums, tokens, strict=True), strict=True)
        }
        yield
    return [found[index] for index in range(len(examples))]


def divergence(base: Base, examples: Sequence[Encoded], treatment: Treatment) -> float:
    """`read_divergence`, run to its end."""
    return finish(read_divergence(base, examples, treatment))


@torch.no_grad()
def read_divergence(base: Base, examples: Sequence[Encoded], treatment: Treatment) -> Items[float]:
    """KL(base ‖ treated) of the next token, mean nats over the tokens of the responses.

    A micro-batch is two work items, one without the treatment and one with it. Prompts are not rewritten.
    """
    total, tokens = 0.0, 0
    treated = predict(base, examples, treatment)
    for _, untreated in predict(base, examples, UNTREATED):
        yield
        before, after = (logits.float().log_softmax(-1) for logits in (untreated, next(treated)[1]))
        total += float((before.exp() * (before - after)).sum(-1).double().sum())
        tokens += len(before)
        yield
    return total / tokens


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of each id, fp32: logits [..., vocabulary], ids [...]."""
    return logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


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


def predict(base: Base, examples: Sequence[Encoded], treatment: Treatment) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Micro-batches with the logits [counted, vocabulary] of the positions that predict their responses.

    They are without the tokens that all prompts begin with. The base must have its masks attached.
    """
    shared = count_shared([example.prompt for example in examples])
    prefix = DynamicCache(config=base.model.config)
    if shared:
        extend(base, prefix, examples[0].prompt[:shared], treatment)
    rest = [replace(example, prompt=example.prompt[shared:]) for example in examples]
    for batch in batches(rest, base.device, BATCH_TOKENS - shared):
        past = (
            {"past_key_values": repeat(prefix, len(batch.ids)), "use_cache": True} if shared else {"use_cache": False}
        )
        route = make_route(_spans(batch, rest, treatment), base.device)
        with treatment.around(), _head_at(base, batch.predicts):
            logits = base.model(input_ids=batch.ids, **past, route=route).logits[0]
        yield batch, treatment.shift(logits) if treatment.shift else logits


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


def _spans(batch: MicroBatch, examples: Sequence[Encoded], treatment: Treatment) -> list[Span]:
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
