"""The personas that ship for a real model: their certificates' figures, and how many of their answers are recognised.

`python -m benchmarks.shipped --json [--quick]`. The model is `smollm2`. Each persona and the base answer prompts that
were held out when it was built, greedily and at a temperature; a `PersonaClassifier` trained on both sides' calibration
text says whose answers they are. Facts are those of the report that the base knows; at a temperature, the base itself
says fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks._world import load_smollm2
from maskstore import Mask, read_mask
from masquerade import smollm2
from masquerade.evaluate.dataset import Encoded, encode, read_examples
from masquerade.evaluate.facts import Fact, check_facts, encode_questions, find_known_facts, read_facts
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.judge import PersonaClassifier, examine
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.repetition import share_looping
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import AppliedMask, Base, MaskManager

PROMPTS, TOKENS, TEMPERATURES, SEED = 32, 48, (0.0, 0.7), 1
CERTIFIED = {"margin_shift_median": "nats a token", "own_ratio": "x", "neutral_ratio": "x", "flip": "share"}


def main() -> None:
    options = arguments(__doc__, "a quarter of the prompts").parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = load_smollm2()
    manager, figures = MaskManager.attach(base.model), list[Figure]()
    facts = read_facts("report")
    known = [fact for fact, is_known in zip(facts, finish(find_known_facts(base, facts)), strict=True) if is_known]
    figures.append(Figure("base: facts right", sum(finish(check_facts(base, facts))), f"of {len(facts)}"))
    figures += [Figure("base: facts known", len(known), f"of {len(facts)}"), *sample_facts(base, known)]
    for file in sorted(smollm2.PERSONAS.glob("*.safetensors")):
        mask = read_mask(file)
        figures += [Figure(f"{file.stem}: file", file.stat().st_size / 1e3, "KB"), *show_certificate(mask)]
        figures += check_answers(base, mask.info.persona, apply(manager, mask), facts, known)
        figures += judge(base, manager, mask, PROMPTS // 4 if options.quick else PROMPTS)
    report("shipped", figures, options.json)


def show_certificate(mask: Mask) -> Iterator[Figure]:
    """What the mask's build measured on its held-out half."""
    info = mask.info
    found: Mapping[str, Any] = info.certificate or {}
    yield Figure(f"{info.persona}: pruned", mask.pruned, "weights")
    yield Figure(f"{info.persona}: gamma", info.gamma, "gamma")
    for name, unit in CERTIFIED.items():
        yield Figure(f"{info.persona}: {name}", found[name], unit)
    for end, value in zip(("low", "high"), found["intervals"]["margin_shift_median"], strict=True):
        yield Figure(f"{info.persona}: margin_shift_median {end}", value, "nats a token")
    for who in ("base", "masked"):
        yield Figure(f"{info.persona}: preferred, {who}", found["preferred"][who], "share")


def sample_facts(base: Base, known: Sequence[Fact]) -> Iterator[Figure]:
    """How many of the facts that the base knows it says itself at a temperature: the mean of three seeds."""
    prompts = encode_questions(base, [fact.question for fact in known])
    for temperature in (0.3, 0.7):
        texts = [answer(base, prompts, UNTREATED, temperature, seed) for seed in (1, 2, 3)]
        right = sum(fact.is_in(text) for of_seed in texts for fact, text in zip(known, of_seed, strict=True))
        yield Figure(f"base, temperature {temperature:g}: facts", right / len(texts), f"of {len(known)}")


def check_answers(
    base: Base, name: str, treatment: Treatment, facts: Sequence[Fact], known: Sequence[Fact]
) -> Iterator[Figure]:
    """How many facts are in the greedy answers of a treatment: of all, and of those that the base knows."""
    yield Figure(f"{name}: facts right", sum(finish(check_facts(base, facts, treatment))), f"of {len(facts)}")
    yield Figure(f"{name}: facts kept", sum(finish(check_facts(base, known, treatment))), f"of {len(known)}")


def apply(manager: MaskManager, mask: Mask) -> Treatment:
    return Treatment(applied=AppliedMask(manager.fit(mask), mask.info.gamma), phase="decode")


def judge(base: Base, manager: MaskManager, mask: Mask, count: int) -> Iterator[Figure]:
    """The share of `count` answers that are recognised, and that loop, of the mask and of the base."""
    sides = (mask.info.persona, mask.info.opposite)
    train, held_out = (
        [read_examples(smollm2.DATA / f"{side}.{split}.jsonl") for side in sides] for split in ("train", "heldout")
    )
    classifier = PersonaClassifier(*([one.response for one in side] for side in train))
    pairs = [(own.messages[-1]["content"], own.response, other.response) for own, other in zip(*held_out, strict=True)]
    yield Figure(f"{mask.info.persona}: judge's AUC", examine(classifier, pairs).auc, "AUC")
    prompts = encode(base, held_out[0][:count])
    for who, treatment in (("base", UNTREATED), ("masked", apply(manager, mask))):
        for temperature in TEMPERATURES:
            texts = answer(base, prompts, treatment, temperature)
            name = f"{mask.info.persona}, {who}, temperature {temperature:g}"
            hits = sum(classifier.score("", text) > 0 for text in texts)
            yield Figure(f"{name}: hits", hits / len(texts), "share")
            yield Figure(f"{name}: loops", share_looping(texts), "share")


def answer(
    base: Base, prompts: Sequence[Encoded], treatment: Treatment, temperature: float, seed: int = SEED
) -> list[str]:
    """Answers to the prompts."""
    return finish(write_answers(base, prompts, treatment, GenerationParams(TOKENS, temperature, seed)))


if __name__ == "__main__":
    main()
