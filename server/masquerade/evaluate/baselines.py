"""The controls that a mask is held against, on the same held-out prompts.

Knows how else the same shift could be had: by nothing, by pruning at random, by preferring words, by prompting, by
retrieval, by steering, by training an adapter. Refuses to know which of them should win.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskstore import Mask, encode
from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example, Message, batches
from masquerade.evaluate.layers import find_layers
from masquerade.evaluate.lora import train_adapter
from masquerade.evaluate.treatment import BARE, Cost, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, render_chat

NEIGHBOURS = 3  # examples that retrieval puts into the prompt
_WORD = re.compile(r"\w+")
Strength = Callable[[float], Treatment]  # how much of it -> the treatment


@dataclass(frozen=True)
class ControlInput:
    """What a control may learn from: the mask it is compared with, and what both sides say."""

    base: Base
    manager: MaskManager
    mask: Mask
    own: Sequence[tuple[Example, Encoded]]
    contrast: Sequence[tuple[Example, Encoded]]
    asked: Mapping[tuple[int, ...], Sequence[Message]]  # prompts that are measured -> what they are the tokens of
    instruction: str = ""  # a system prompt that asks for the persona
    seed: int = 0


@dataclass(frozen=True)
class Baseline:
    """A way to make a control, the strength it is used at, and others that are tried for equal neutral cost."""

    make: Callable[[ControlInput], Strength]
    usual: float = 1.0
    strengths: tuple[float, ...] = ()


def do_nothing(_: ControlInput) -> Strength:
    """The base itself."""
    return lambda _: BARE


def prune_randomly(question: ControlInput) -> Strength:
    """As many weights of every Linear as the mask prunes, chosen at random."""
    rng = np.random.default_rng(question.seed)

    def scatter(shape: tuple[int, int], count: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        pruned = np.zeros(shape[0] * shape[1], dtype=bool)
        pruned[rng.choice(pruned.size, count, replace=False)] = True
        return pruned.reshape(shape)

    targets = {name: encode(scatter(target.shape, target.pruned)) for name, target in question.mask.targets.items()}
    random = Mask(question.mask.base, targets, question.mask.info)
    worn, cost = question.manager.fit(random), Cost(nbytes=random.nbytes)
    return lambda strength: Treatment(
        applied=AppliedMask(worn, 1 - strength), phase=question.mask.info.phase, cost=cost
    )


def prefer_words(question: ControlInput) -> Strength:
    """Log-odds of each token between the two sides' answers, added to every logit.

    A persona that is mostly vocabulary is had this cheaply; a mask should do better.
    """
    vocabulary = question.base.vocabulary

    def frequency(side: Sequence[tuple[Example, Encoded]]) -> Tensor:
        tokens = torch.tensor([token for _, encoded in side for token in encoded.response])
        counts = torch.bincount(tokens, minlength=vocabulary).float() + 1
        return counts / counts.sum()

    odds = (frequency(question.own) / frequency(question.contrast)).log().to(question.base.device)
    cost = Cost(nbytes=odds.nbytes)
    return lambda strength: Treatment(shift=lambda logits: logits + strength * odds, cost=cost)


def instruct(question: ControlInput) -> Strength:
    """A system prompt in every request. Raises `BadDataset` if there is none."""
    if not question.instruction:
        raise BadDataset("the baseline `prompt` needs a system prompt that asks for the persona; give --system-prompt")
    return _rewrite(question, lambda messages: _instruct(messages, question.instruction))


def retrieve(question: ControlInput) -> Strength:
    """The answers to the `NEIGHBOURS` most similar questions, as earlier turns of the chat: cosine of tf-idf words."""
    library = [example for example, _ in question.own if example.messages]
    known = [Counter(_words(example.messages)) for example in library]
    frequency = Counter(word for words in known for word in words)
    weight = {word: math.log(1 + len(known) / count) for word, count in frequency.items()}

    def vector(words: Counter[str]) -> dict[str, float]:
        raw = {word: count * weight.get(word, 0.0) for word, count in words.items()}
        norm = math.sqrt(sum(value * value for value in raw.values())) or 1.0
        return {word: value / norm for word, value in raw.items()}

    vectors = [vector(words) for words in known]

    def recall(messages: Sequence[Message]) -> list[Message]:
        asked = vector(Counter(_words(messages)))
        closeness = [sum(asked.get(word, 0.0) * value for word, value in one.items()) for one in vectors]
        nearest = sorted(range(len(library)), key=lambda index: -closeness[index])[:NEIGHBOURS]
        turns: list[Message] = []
        for index in reversed(nearest):  # the nearest stands nearest
            turns += [*library[index].messages, {"role": "assistant", "content": library[index].response}]
        head = [message for message in messages if message["role"] == "system"]
        return [*head, *(t for t in turns if t["role"] != "system"), *messages[len(head) :]]

    return _rewrite(question, recall)


def steer(question: ControlInput) -> Strength:
    """The difference of both sides' mean hidden states after the middle layer, added there to every position."""
    layers = find_layers(question.base.model)
    layer = layers[len(layers) // 2]
    sides = (question.own, question.contrast)
    own, contrast = (_mean_state(question.base, layer, [encoded for _, encoded in side]) for side in sides)
    difference = own - contrast  # [hidden]
    cost = Cost(nbytes=difference.nbytes)

    @contextmanager
    def push(strength: float) -> Iterator[None]:
        def add(_: nn.Module, __: Any, output: Any) -> Any:
            moved = strength * difference
            return (output[0] + moved, *output[1:]) if isinstance(output, tuple) else output + moved

        handle = layer.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    return lambda strength: Treatment(around=partial(push, strength), cost=cost)


def adapt(question: ControlInput, contrastive: bool = False) -> Strength:
    """A LoRA of rank 4 on every maskable Linear, trained on the own answers, or on the preference for them."""
    own, contrast = ([encoded for _, encoded in side] for side in (question.own, question.contrast))
    adapter = train_adapter(question.base, own, contrast if contrastive else (), seed=question.seed)
    cost = Cost(nbytes=adapter.nbytes)
    return lambda strength: Treatment(around=partial(adapter.worn, strength), cost=cost)


_SCALES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
BASELINES: Mapping[str, Baseline] = {
    "none": Baseline(do_nothing),
    "random": Baseline(prune_randomly),
    "bias": Baseline(prefer_words, usual=0.5, strengths=(0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5)),
    "prompt": Baseline(instruct),
    "retrieval": Baseline(retrieve),
    "steering": Baseline(steer, strengths=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
    "lora": Baseline(adapt, strengths=_SCALES),
    "lora-contrastive": Baseline(partial(adapt, contrastive=True), strengths=_SCALES),
}


def _rewrite(question: ControlInput, change: Callable[[Sequence[Message]], Sequence[Message]]) -> Strength:
    """Other messages in place of those that were asked; earlier turns are left out until there is room to answer."""
    base = question.base
    room = base.context - max(64, base.context // 4)
    changed: dict[tuple[int, ...], tuple[int, ...]] = {}
    for prompt, messages in question.asked.items():
        longer = list(change(messages)) if messages else []
        tokens = render_chat(base.tokenizer, longer) if longer else prompt
        while len(tokens) > room and len(longer) > len(messages) + 1:
            del longer[:2]
            tokens = render_chat(base.tokenizer, longer)
        changed[prompt] = tuple(tokens) if len(tokens) <= room else prompt
    extra = sum(len(changed[prompt]) - len(prompt) for prompt in changed) / max(1, len(changed))

    def rewrite(example: Encoded) -> Encoded:
        prompt = changed.get(example.prompt, example.prompt)
        return replace(example, prompt=prompt, response=example.response[: base.context - len(prompt)])

    treatment = Treatment(rewrite=rewrite, cost=Cost(prompt_tokens=extra))
    return lambda _: treatment


def _instruct(messages: Sequence[Message], instruction: str) -> list[Message]:
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": instruction}, *rest]


def _words(messages: Sequence[Message]) -> list[str]:
    return _WORD.findall(messages[-1]["content"].lower())


@torch.no_grad()
def _mean_state(base: Base, layer: nn.Module, examples: Sequence[Encoded]) -> Tensor:
    """Of a layer's output over the positions that predict responses, [hidden]."""
    states: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, y: states.append(y[0] if isinstance(y, tuple) else y))
    total, count = torch.zeros((), device=base.device), 0
    try:
        for batch in batches(examples, base.device):
            base.model(input_ids=batch.ids, use_cache=False)
            total = total + states.pop()[batch.predicts].float().sum(0)
            count += int(batch.predicts.sum())
    finally:
        handle.remove()
    return (total / count).to(base.dtype)
