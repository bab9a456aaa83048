"""Answers of the personas that ship for SmolLM2, beside those of the base and of a system prompt, as Markdown.

`python -m benchmarks.answers > docs/answers.md`. Greedy, in phase `decode` at each mask's own gamma. The ten prompts
were picked before the first run, and nothing is left out.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.utils import logging

from benchmarks._world import load_smollm2
from benchmarks.real_personas import PROMPTS as PROMPTS_OF
from benchmarks.shipped import apply
from maskstore import Mask, read_mask
from masquerade import smollm2
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, MaskManager

TOKENS, WIDTH = 48, 100
PROMPTS = (
    "What are you doing this weekend?",
    "Write a description of a person walking in the park.",
    "How do you feel about parties?",
    "What is the capital of France?",
    "Suggest a hobby for me.",
    "Describe your ideal holiday.",
    "How should I celebrate my birthday?",
    "Tell me about your best friend.",
    "What makes a good team?",
    "How do I boil an egg?",
)
SYSTEM = {
    **{name: PROMPTS_OF[name] for name in ("introvert", "extravert", "casual", "formal")},
    "cheerful": "You are cheerful: happy, optimistic and enthusiastic about everything.",
    "grumpy": "You are grumpy: you complain about everything, and nothing is good enough.",
    "storyteller": "You are a storyteller: you answer with a tale, in vivid pictures.",
    "plain": "You speak plainly: short, dry, factual sentences without any decoration.",
}
HEAD = """# Answers

Answers to ten prompts, picked before the first run, of the personas that ship for SmolLM2-135M-Instruct: the base's,
each persona's, and the base's with a system prompt. They are greedy, at most {tokens} tokens, unedited (a line break is
a slash), and none is left out. `python -m benchmarks.answers > docs/answers.md` writes this page; the figures of these
personas are in [models.md](models.md#personas-of-smollm2).

The system prompts:
"""


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = load_smollm2()
    manager = MaskManager.attach(base.model)
    masks = [read_mask(file) for file in sorted(smollm2.PERSONAS.glob("*.safetensors"))]
    print(fill(HEAD.format(tokens=TOKENS)))
    print("\n".join(fold(f"* {name}: “{SYSTEM[name]}”") for name in SYSTEM))
    untreated = answer(base, UNTREATED)
    for own, other in pair_up(masks):
        print(f"\n## {own.info.persona.capitalize()} and {other.info.persona}")
        of_pair = list(answer_as(base, manager, (own, other)))
        for number, prompt in enumerate(PROMPTS):
            print(f"\n**{prompt}**\n")
            for label, texts in [("base", untreated), *of_pair]:
                print(fold(f"* {label}: {texts[number]}"))
        print(f"{own.info.persona} and {other.info.persona} are done", file=sys.stderr)


def pair_up(masks: Sequence[Mask]) -> Iterator[tuple[Mask, Mask]]:
    """Each mask with its opposite, once, in the order of `SYSTEM`."""
    by_name: dict[Any, Mask] = {mask.info.persona: mask for mask in masks}
    for name in SYSTEM:
        if name in by_name:
            own = by_name.pop(name)
            yield own, by_name.pop(own.info.opposite)


def answer_as(base: Base, manager: MaskManager, masks: Sequence[Mask]) -> Iterator[tuple[str, list[str]]]:
    """Each mask's answers, then those of the base with each persona's system prompt."""
    for mask in masks:
        yield f"**{mask.info.persona}**", answer(base, apply(manager, mask))
    for mask in masks:
        name = mask.info.persona
        yield f"{name} prompt", answer(base, UNTREATED, SYSTEM[name])


def answer(base: Base, treatment: Treatment, system: str = "") -> list[str]:
    """Greedy answers to the prompts, with line breaks as slashes."""
    before = ({"role": "system", "content": system},) if system else ()
    asked: list[Encoded] = encode(
        base, [Example((*before, {"role": "user", "content": prompt}), "-") for prompt in PROMPTS]
    )
    texts = finish(write_answers(base, asked, treatment, GenerationParams(TOKENS)))
    return [" / ".join(text.split("\n")) for text in texts]


def fill(text: str) -> str:
    return "\n\n".join(textwrap.fill(part, WIDTH) for part in text.strip().split("\n\n")) + "\n"


def fold(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
