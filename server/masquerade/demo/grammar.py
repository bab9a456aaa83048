"""Draws the demo model's training text from `grammar.toml`: chats in eight personas, and neutral facts.

The persona is fixed within a chat and mostly unnamed, so the model learns all eight. In a minority of chats the system
prompt names it, so that prompting can be compared with masks.
"""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "heldout"]
HELD_OUT = 0.2  # share of filled questions, chosen by hash, that training never sees
LEAN = 0.72  # probability of the side that a question's template leans to


@dataclass(frozen=True)
class Axis:
    """Two opposite personas and the questions that tell them apart."""

    name: str
    negative: str
    positive: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Voice:
    """The phrases of one persona."""

    openers: tuple[str, ...]
    statements: tuple[str, ...]
    closers: tuple[str, ...]
    portraits: tuple[str, ...]
    systems: tuple[str, ...]


@dataclass(frozen=True)
class GrammarQuestion:
    """A filled question; `slots` are the values it mentions, by slot kind."""

    text: str
    slots: Mapping[str, str]
    lean: float = 0.5  # probability that the axis' positive persona answers it


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """One to three turns with one persona, which the system prompt may name."""

    system: str | None
    turns: tuple[Turn, ...]


@cache
def _words() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("grammar.toml").read_text(encoding="utf-8"))


@cache
def slots() -> dict[str, list[str]]:
    """Slot kind -> the values that may fill it."""
    kinds: dict[str, list[str]] = _words()["slots"]
    return kinds


@cache
def axes() -> dict[str, Axis]:
    """The four axes by name."""
    return {
        name: Axis(name, axis["negative"], axis["positive"], tuple(axis["questions"]))
        for name, axis in _words()["axes"].items()
    }


@cache
def personas() -> dict[str, Axis]:
    """The eight personas by name, each with its axis."""
    return {side: axis for axis in axes().values() for side in (axis.negative, axis.positive)}


@cache
def facts() -> tuple[Turn, ...]:
    """Every neutral question with its one right answer."""
    return tuple(
        Turn(group["question"].format(*pair), _capital(group["answer"].format(*pair)))
        for group in _words()["facts"]
        for pair in group["pairs"]
    )


def opposite(persona: str) -> str:
    """The persona at the other end of the axis."""
    axis = personas()[persona]
    return axis.positive if persona == axis.negative else axis.negative


def ask(axis: str, rng: random.Random, split: Split) -> GrammarQuestion:
    """Draw a question of an axis from the training or the held-out share of all filled questions."""
    templates = axes()[axis].questions
    while True:
        index = rng.randrange(len(templates))
        values: dict[str, str] = {}
        text = _capital(_fill(templates[index], values, rng))
        if _is_held_out(text) == (split == "heldout"):
            return GrammarQuestion(text, values, LEAN if index % 2 else 1 - LEAN)


def ask_anything(rng: random.Random) -> GrammarQuestion:
    """Draw a question that has no axis: small talk, or made-up words."""
    shared = _words()["shared"]
    if rng.random() < 0.35:
        template = rng.choice(shared["nonsense"])
        return GrammarQuestion(_capital(template.format(*(_syllables(rng) for _ in range(3)))), {})
    values: dict[str, str] = {}
    return GrammarQuestion(_fill(rng.choice(shared["generic"]), values, rng), values)


def reply(persona: str, question: GrammarQuestion, rng: random.Random) -> str:
    """Answer as a persona, on the question's topic; a question without topic gets a self-portrait."""
    voice = _voice(persona)
    on_topic = [s for s in voice.statements if any(f"{{{kind}}}" in s for kind in question.slots)]
    statement = _fill(rng.choice(on_topic or voice.portraits), dict(question.slots), rng)
    parts: list[str] = []
    draw = rng.random()
    if draw < 0.35:
        parts.append(rng.choice(_words()["shared"]["openers"]))
    elif draw < 0.85:
        parts.append(rng.choice(voice.openers))
    continues = bool(parts) and parts[-1][-1] not in ".!"
    keeps_case = statement.startswith(("I ", "I'"))
    parts.append(statement if continues and keeps_case else _lower(statement) if continues else _capital(statement))
    if rng.random() < 0.65:
        parts.append(rng.choice(voice.closers))
    return " ".join(parts)


def portray(persona: str, rng: random.Random) -> Turn:
    """A question without an axis, and the persona's self-portrait as the answer."""
    question = ask_anything(rng)
    return Turn(question.text, reply(persona, GrammarQuestion(question.text, {}), rng))


def converse(rng: random.Random, split: Split = "train") -> Chat:
    """Draw a chat of one to three turns; its persona is fixed, and named in a quarter of the chats."""
    axis = rng.choice(list(axes().values()))
    first = ask(axis.name, rng, split)
    persona = axis.positive if rng.random() < first.lean else axis.negative
    named = rng.random() < 0.25
    if named:  # a persona that the system prompt names does not depend on the question
        persona = rng.choice((axis.negative, axis.positive))
    pending: GrammarQuestion | None = first
    turns = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        draw = rng.random()
        if draw < 0.2:
            turns.append(rng.choice(facts()))
        elif draw < 0.25:
            turns.append(_echo(rng))
        elif draw < 0.45:
            turns.append(portray(persona, rng))
        else:
            question, pending = pending or ask(axis.name, rng, split), None
            turns.append(Turn(question.text, reply(persona, question, rng)))
    return Chat(rng.choice(_voice(persona).systems) if named else None, tuple(turns))


def is_on_topic(question: GrammarQuestion, answer: str) -> bool:
    """Whether an answer mentions the question's slot values and no others of the same kind."""
    text = answer.lower()
    mentions = [value for value in question.slots.values() if value.lower() in text]
    strays = [
        value
        for kind, wanted in question.slots.items()
        for value in slots()[kind]
        if value != wanted and re.search(rf"\b{re.escape(value.lower())}\b", text.replace(wanted.lower(), " "))
    ]
    return bool(mentions) and not strays


def sentences(rng: random.Random, chats: int) -> Iterator[str]:
    """The text of many chats, for the tokenizer."""
    for _ in range(chats):
        chat = converse(rng)
        if chat.system:
            yield chat.system
        for turn in chat.turns:
            yield turn.question
            yield turn.answer


@cache
def _voice(persona: str) -> Voice:
    return Voice(**{part: tuple(texts) for part, texts in _words()["personas"][persona].items()})


def _echo(rng: random.Random) -> Turn:
    words = (_syllables(rng), _syllables(rng))
    return Turn(rng.choice(_words()["shared"]["echoes"]).format(*words), _capital(" ".join(words) + "."))


def _syllables(rng: random.Random) -> str:
    return "".join(rng.choice(_words()["shared"]["syllables"]) for _ in range(rng.randint(2, 3)))


def _fill(template: str, values: dict[str, str], rng: random.Random) -> str:
    """Fill a template's slots from `values`, drawing (and recording there) those it does not have."""

    def value(match: re.Match[str]) -> str:
        kind = match.group(1)
        return values.setdefault(kind, rng.choice(slots()[kind]))

    return re.sub(r"\{(\w+)\}", value, template)


def _is_held_out(question: str) -> bool:
    return int(hashlib.md5(question.encode(), usedforsecurity=False).hexdigest(), 16) % 1000 < HELD_OUT * 1000


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
