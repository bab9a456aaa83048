"""Generates calibration examples from a system prompt: the base answers questions with the prompt and without it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example, Message, encode
from masquerade.evaluate.generation import GenerationParams, generate
from masquerade.model import Base, render_chat
from masquerade.pruning.data import ENCODED, PersonaExamples
from masquerade.pruning.progress import Progress, Work
from masquerade.pruning.scratch import Scratch

WRITTEN = "written"  # name of the answers in the scratch


@dataclass(frozen=True)
class CalibrationPrompts:
    """The system prompts of a persona and of its opposite (none by default), and the questions to both."""

    system: str
    questions: Sequence[tuple[Message, ...]]
    contrast: str = ""
    tokens: int = 96  # most tokens of an answer
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0


@dataclass(frozen=True)
class GeneratedExamples:
    """Both sides' answers to the same questions, without the system prompts, and the tokens of the persona's prompt."""

    own: Sequence[Example]
    contrast: Sequence[Example]
    prompt_tokens: int


def sample_questions(
    questions: Sequence[tuple[Message, ...]], most: int | None, seed: int
) -> Sequence[tuple[Message, ...]]:
    """At most `most` of the questions, drawn by seed."""
    return questions if most is None or most >= len(questions) else random.Random(seed).sample(questions, most)


def add_generated(
    base: Base,
    prompts: CalibrationPrompts,
    own: PersonaExamples,
    contrast: PersonaExamples,
    scratch: Scratch | None = None,
) -> Work[tuple[PersonaExamples, PersonaExamples]]:
    """Both sides' examples, with the generated ones before the given ones."""
    generated = yield from generate_examples(base, prompts, scratch)
    origin = {"system_prompt": {"text": prompts.system, "tokens": generated.prompt_tokens}}
    return (
        replace(own, examples=[*generated.own, *own.examples], origin=origin),
        replace(contrast, examples=[*generated.contrast, *contrast.examples]),
    )


def generate_examples(
    base: Base, prompts: CalibrationPrompts, scratch: Scratch | None = None
) -> Work[GeneratedExamples]:
    """Generate both sides' answers to every question; questions with an empty answer are left out.

    A work item is one pass of the model, or tokenises some questions without the model, as the first one does. Answers
    are kept in the scratch, from which an interrupted run resumes. Raises `BadDataset` if all answers of both sides are
    equal, as the base does not follow the prompt then. The base must have its masks attached.
    """
    kept = scratch or Scratch()
    sides: list[list[str]] = []
    for side, system in enumerate((prompts.system, prompts.contrast)):
        head: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
        questions = [
            Example((*head, *question), "?", f"question {number}")
            for number, question in enumerate(prompts.questions, 1)
        ]
        encoded: list[Encoded] = []
        texts = _load(kept, side)
        while len(encoded) < len(questions):
            encoded += encode(base, questions[len(encoded) : len(encoded) + ENCODED])
            answers_next = len(encoded) == len(questions) > len(texts)
            yield Progress("ask", side * len(questions) + len(encoded), 2 * len(questions), model_next=answers_next)
        params = GenerationParams(prompts.tokens, prompts.temperature, prompts.seed + side)
        for more in generate(base, encoded[len(texts) :], params=params):
            if more:
                texts += more
                _save(kept, side, texts)
            done = side * len(encoded) + len(texts)
            yield Progress("write", done, 2 * len(encoded), model_next=len(texts) < len(encoded))
        sides.append([text.strip() for text in texts])
    both = [(q, a, b) for q, a, b in zip(prompts.questions, *sides, strict=True) if a and b]
    if not any(a != b for _, a, b in both):
        raise BadDataset(
            f"the base answers all {len(prompts.questions)} questions alike under the prompt and without it; it does "
            "not follow system prompts, so give examples of how the persona talks instead"
        )
    without, length = (
        len(render_chat(base.tokenizer, [*head, *prompts.questions[0]]))
        for head in ((), ({"role": "system", "content": prompts.system},))
    )
    own, contrast = [Example(q, a) for q, a, _ in both], [Example(q, b) for q, _, b in both]
    return GeneratedExamples(own, contrast, prompt_tokens=length - without)


def _save(scratch: Scratch, side: int, texts: Sequence[str]) -> None:
    scratch.put(
        f"{WRITTEN}/{side}", {"json": torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)}
    )


def _load(scratch: Scratch, side: int) -> list[str]:
    name = f"{WRITTEN}/{side}"
    found: list[str] = json.loads(bytes(scratch.get(name)["json"].tolist())) if name in scratch else []
    return found
