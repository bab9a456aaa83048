"""The controls that a mask is compared with: random pruning, logit bias, prompting, retrieval, steering and LoRA."""

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
from masquerade.evaluate.lora import AdapterData, train_adapter
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_layers, render_chat

NEIGHBOURS = 3  # examples that retrieval puts into the prompt
_WORD = re.compile(r"\w+")
TreatmentFactory = Callable[[float], Treatment]  # strength -> treatment


@dataclass(frozen=True)
class ControlInput:
    """What a control is made from: the mask it is compared with, and both sides' examples."""

    base: Base
    manager: MaskManager
    mask: Mask
    own: Sequence[tuple[Example, Encoded]]
    contrast: Sequence[tuple[Example, Encoded]]
    neutral: Sequence[Encoded] = ()  # neutral text to learn from, where a control does
    instruction: str = ""  # a system prompt that describes the persona
    seed: int = 0
    report: Callable[[], None] = lambda: None  # called after each step of a training


@dataclass(frozen=True)
class Baseline:
    """How to make a control, its default strength, and the strengths, ascending, to try for equal neutral cost."""

    make: Callable[[ControlInput], TreatmentFactory]
    default: float = 1.0
    strengths: tuple[float, ...] = ()


def do_nothing(_: ControlInput) -> TreatmentFactory:
    """The base itself."""
    return lambda _: UNTREATED


def prune_randomly(inputs: ControlInput) -> TreatmentFactory:
    """As many weights of every Linear as the mask prunes, chosen at random."""
    rng = np.random.default_rng(inputs.seed)

    def scatter(shape: tuple[int, int], count: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        pruned = np.zeros(shape[0] * shape[1], dtype=bool)
        pruned[rng.choice(pruned.size, count, replace=False)] = True
        return pruned.reshape(shape)

    targets = {name: encode(scatter(target.shape, target.pruned)) for name, target in inputs.mask.targets.items()}
    random = Mask(inputs.mask.base, targets, inputs.mask.info)
    return apply_mask(inputs.manager, random)


def apply_mask(manager: MaskManager, mask: Mask) -> TreatmentFactory:
    """A mask in its default phase; its strength is 1 - gamma."""
    resident, phase, nbytes = manager.fit(mask), mask.info.phase, mask.nbytes
    return lambda strength: Treatment(applied=AppliedMask(resident, 1 - strength), phase=phase, nbytes=nbytes)


def prefer_words(inputs: ControlInput) -> TreatmentFactory:
    """Each token's log-odds between the two sides' answers, added to its logit.

    This is enough for a persona that is mostly vocabulary; a mask should do better.
    """
    vocabulary = inputs.base.vocabulary

    def frequency(side: Sequence[tuple[Example, Encoded]]) -> Tensor:
        tokens = torch.tensor([token for _, encoded in side for token in encoded.response])
        counts = torch.bincount(tokens, minlength=vocabulary).float() + 1
        return counts / counts.sum()

    odds = (frequency(inputs.own) / frequency(inputs.contrast)).log().to(inputs.base.device)
    return lambda strength: Treatment(shift=lambda logits: logits + strength * odds, nbytes=odds.nbytes)


def instruct(inputs: ControlInput) -> TreatmentFactory:
    """A system prompt in every request. Raises `BadDataset` if `instruction` is empty."""
    if not inputs.instruction:
        raise BadDataset("the baseline `prompt` needs a system prompt that describes the persona; give --system-prompt")
    return _rewrite(inputs, lambda messages: _instruct(messages, inputs.instruction))


def retrieve(inputs: ControlInput) -> TreatmentFactory:
    """The `NEIGHBOURS` most similar questions (tf-idf cosine) and their answers, as earlier turns of the chat."""
    library = [example for example, _ in inputs.own if example.messages]
    known = [Counter(_words(example.messages)) for example in library]
    frequency = Counter(word for words in known for word in words)
    weight = {word: math.log(1 + len(known) / count) for word, count in frequency.items()}

    def vector(words: Counter[str]) -> dict[str, float]:
        raw = {word: count * weight.get(word, 0.0) for word, count in words.items()}
        norm = math.sqrt(sum(value * value for value in raw.values())) or 1.0
        return {word: value / norm for word, value in raw.items()}

    vectors = [vector(words) for words in known]

    def recall(messages: Sequence[Message]) -> list[Message]:
        query = vector(Counter(_words(messages)))
        similarities = [sum(query.get(word, 0.0) * value for word, value in one.items()) for one in vectors]
        nearest = sorted(range(len(library)), key=lambda index: -similarities[index])[:NEIGHBOURS]
        turns: list[Message] = []
        for index in reversed(nearest):  # the most similar one last, next to the question
            turns += [*library[index].messages, {"role": "assistant", "content": library[index].response}]
        head = [message for message in messages if message["role"] == "system"]
        return [*head, *(t for t in turns if t["role"] != "system"), *messages[len(head) :]]

    return _rewrite(inputs, recall)


def steer(inputs: ControlInput) -> TreatmentFactory:
    """The difference of both sides' mean hidden states after the middle layer, added there to every position."""
    layers = find_layers(inputs.base.model)
    layer = layers[len(layers) // 2]
    sides = (inputs.own, inputs.contrast)
    own, contrast = (_mean_state(inputs.base, layer, [encoded for _, encoded in side]) for side in sides)
    difference = own - contrast  # [hidden]

    @contextmanager
    def steered(strength: float) -> Iterator[None]:
        def add(_: nn.Module, __: Any, output: Any) -> Any:
            offset = strength * difference
            return (output[0] + offset, *output[1:]) if isinstance(output, tuple) else output + offset

        handle = layer.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    return lambda strength: Treatment(around=partial(steered, strength), nbytes=difference.nbytes)


def adapt(inputs: ControlInput, contrastive: bool = False) -> TreatmentFactory:
    """A LoRA of rank 4 on every maskable Linear, trained on the own answers, or on the preference for them.

    The contrastive one is also held to the base on neutral text, where there is any.
    """
    own, contrast = ([encoded for _, encoded in side] for side in (inputs.own, inputs.contrast))
    data = AdapterData(own, contrast, inputs.neutral) if contrastive else AdapterData(own)
    adapter = train_adapter(inputs.base, data, seed=inputs.seed, report=inputs.report)
    return lambda strength: Treatment(around=partial(adapter.applied, strength), nbytes=adapter.nbytes)


SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # strengths of a mask, 1 - gamma
_SCALES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
BASELINES: Mapping[str, Baseline] = {
    "none": Baseline(do_nothing),
    "random": Baseline(prune_randomly, strengths=SHARES),
    "bias": Baseline(prefer_words, default=0.5, strengths=(0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
    "prompt": Baseline(instruct),
    "retrieval": Baseline(retrieve),
    "steering": Baseline(steer, strengths=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
    "lora": Baseline(adapt, strengths=_SCALES),
    "lora-contrastive": Baseline(partial(adapt, contrastive=True), strengths=_SCALES),
}


def _rewrite(inputs: ControlInput, change: Callable[[Sequence[Message]], Sequence[Message]]) -> TreatmentFactory:
    """Change the messages of every prompt, neutral questions too; plain text has none and stays as it is.

    Turns before the question are dropped, the first ones first, until there is room for an answer.
    """
    base = inputs.base
    room = base.context - max(64, base.context // 4)
    changed: dict[tuple[int, ...], tuple[int, ...]] = {}

    def find(prompt: tuple[int, ...], messages: Sequence[Message]) -> tuple[int, ...]:
        longer = list(change(messages))
        tokens = render_chat(base.tokenizer, longer)
        head = sum(message["role"] == "system" for message in longer)
        while len(tokens) > room and len(longer) > len(messages) + 1:
            del longer[head : head + 2]
            tokens = render_chat(base.tokenizer, longer)
        return tuple(tokens) if len(tokens) <= room else prompt

    def rewrite(example: Encoded) -> Encoded:
        if not example.messages:
            return example
        if example.prompt not in changed:
            changed[example.prompt] = find(example.prompt, example.messages)
        prompt = changed[example.prompt]
        return replace(example.cut(base.context - len(prompt)), prompt=prompt)

    treatment = Treatment(rewrite=rewrite)
    return lambda _: treatment


def _instruct(messages: Sequence[Message], instruction: str) -> list[Message]:
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": instruction}, *rest]


def _words(messages: Sequence[Message]) -> list[str]:
    return _WORD.findall(messages[-1]["content"].lower())


@torch.no_grad()
def _mean_state(base: Base, layer: nn.Module, examples: Sequence[Encoded]) -> Tensor:
    """Mean of a layer's output over the positions that predict responses, [hidden]."""
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
