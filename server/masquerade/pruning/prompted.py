"""Calibration text from a system prompt: the base writes it itself, under the prompt and without it.

Knows how questions become two sides' examples, in which the prompt no longer appears. Refuses to know how a persona is
found in them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example, Message, encode
from masquerade.evaluate.generation import Speech, answer
from masquerade.model import Base, render_chat
from masquerade.pruning.builder import ENCODED, Progress, Speaker, Work
from masquerade.pruning.scratch import Scratch


@dataclass(frozen=True)
class Script:
    """What the persona is told to be, what its opposite is told (nothing, by default), and what both are asked."""

    system: str
    questions: Sequence[tuple[Message, ...]]
    contrast: str = ""
    tokens: int = 96  # longest answer
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """Both sides' answers to the same questions, without the prompts, and what the prompt cost in every request."""

    own: Sequence[Example]
    contrast: Sequence[Example]
    prompt_tokens: int


def draw(questions: Sequence[tuple[Message, ...]], most: int | None, seed: int) -> Sequence[tuple[Message, ...]]:
    """At most `most` of the questions, drawn by seed."""
    return questions if most is None or most >= len(questions) else random.Random(seed).sample(questions, most)


def perform(
    base: Base, script: Script, own: Speaker, contrast: Speaker, scratch: Scratch | None = None
) -> Work[tuple[Speaker, Speaker]]:
    """Both speakers, with what the base writes for a script before the examples that they have already."""
    written = yield from write(base, script, scratch)
    origin = {"system_prompt": {"text": script.system, "tokens": written.prompt_tokens}}
    return (
        replace(own, examples=[*written.own, *own.examples], origin=origin),
        replace(contrast, examples=[*written.contrast, *contrast.examples]),
    )


def write(base: Base, script: Script, scratch: Scratch | None = None) -> Work[Written]:
    """Have the base answer every question as both sides; questions that either has no words for are left out.

    A work item is one pass of the model, or the tokenising of some questions, which uses no model; the first item is of
    that kind. What is answered is kept in the scratch, to go on from after a kill. Raises
    `BadDataset` if both sides say the same: then the base does not follow the prompt. The base must have its masks
    attached.
    """
    kept = scratch or Scratch()
    sides: list[list[str]] = []
    for number, system in enumerate((script.system, script.contrast)):
        head: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
        questions = [Example((*head, *question), "?", f"question {at}") for at, question in _number(script)]
        asked: list[Encoded] = []
        texts = _recall(kept, number)
        while len(asked) < len(questions):
            asked += encode(base, questions[len(asked) : len(asked) + ENCODED])
            more_to_do = len(asked) == len(questions) > len(texts)
            yield Progress("ask", number * len(questions) + len(asked), 2 * len(questions), model_next=more_to_do)
        speech = Speech(script.tokens, script.temperature, script.seed + number)
        for more in answer(base, asked[len(texts) :], speech=speech):
            if more:
                texts += more
                _keep(kept, number, texts)
            done = number * len(asked) + len(texts)
            yield Progress("write", done, 2 * len(asked), model_next=len(texts) < len(asked))
        sides.append([text.strip() for text in texts])
    both = [(q, a, b) for q, a, b in zip(script.questions, *sides, strict=True) if a and b]
    if not any(a != b for _, a, b in both):
        raise BadDataset(
            f"the base answers all {len(script.questions)} questions alike under the prompt and without it; it does "
            "not follow system prompts, so give examples of how the persona talks instead"
        )
    bare, told = (
        len(render_chat(base.tokenizer, [*head, *script.questions[0]]))
        for head in ((), ({"role": "system", "content": script.system},))
    )
    return Written([Example(q, a) for q, a, _ in both], [Example(q, b) for q, _, b in both], told - bare)


def _number(script: Script) -> list[tuple[int, tuple[Message, ...]]]:
    return list(enumerate(script.questions, 1))


def _keep(scratch: Scratch, side: int, texts: Sequence[str]) -> None:
    scratch.put(f"written/{side}", {"json": torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)})


def _recall(scratch: Scratch, side: int) -> list[str]:
    name = f"written/{side}"
    found: list[str] = json.loads(bytes(scratch.get(name)["json"].tolist())) if name in scratch else []
    return found
