"""Writes the calibration text of SmolLM2's personas: `python -m masquerade.smollm2.calibration`.

Line N of a persona's file and line N of its opposite's answer the same prompt. Held-out answers are about topics, and
in sentences, that the others do not have.
"""

from __future__ import annotations

import random
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from masquerade import smollm2
from masquerade.demo.calibration import write_turns
from masquerade.demo.grammar import Split, Turn

LINES: Mapping[Split, int] = {"train": 256, "heldout": 120}
CHATS = 0.4  # share of prompts without a topic
OPENERS = 0.35  # share of answers that begin with a phrase of the persona, and not as the base's answers do
HELD_OUT = 4  # one in so many sentences of a voice is in held-out answers only


def main() -> None:
    """Write `<persona>.train.jsonl` and `<persona>.heldout.jsonl` for all personas."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else smollm2.DATA
    folder.mkdir(parents=True, exist_ok=True)
    for persona, opposite in read_pairs().items():
        for split in LINES:
            turns = list(write_pairs((persona, opposite), split))
            write_turns(folder / f"{persona}.{split}.jsonl", (own for own, _ in turns))
            write_turns(folder / f"{opposite}.{split}.jsonl", (other for _, other in turns))


def read_pairs() -> dict[str, str]:
    """Persona -> its opposite."""
    pairs: dict[str, str] = _words()["pairs"]
    return pairs


def write_pairs(personas: tuple[str, str], split: Split) -> Iterator[tuple[Turn, Turn]]:
    """Both personas' answers to the same prompts. The prompts about topics are all different."""
    rng = random.Random(f"{personas[0]} {split}")
    own, other = (read_voice(persona, split) for persona in personas)
    chats = [one for number, one in enumerate(_words()["chats"]) if _is_of(split, number)]
    asked: set[str] = set()
    for number in range(LINES[split]):
        chat = number < CHATS * LINES[split]
        while True:
            slots = _draw_slots(_words()["topics"][split], rng)
            prompt = chats[number % len(chats)] if chat else _fill(rng.choice(_words()["prompts"]), slots, rng)
            if chat or prompt not in asked:
                break
        asked.add(prompt)
        kinds = _draw_kinds(chat, rng)
        seed = rng.random()
        first, second = (_answer(voice, kinds, slots, random.Random(seed)) for voice in (own, other))
        yield Turn(prompt, first), Turn(prompt, second)


@cache
def _words() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def read_voice(persona: str, split: Split) -> dict[str, list[str]]:
    """The sentences of a persona for a split, by kind."""
    return {
        kind: [one for number, one in enumerate(sentences) if _is_of(split, number)]
        for kind, sentences in _words()["voices"][persona].items()
    }


def _draw_slots(topics: Sequence[Sequence[Any]], rng: random.Random) -> dict[str, str]:
    it, doing, do, details = rng.choice(topics)
    part, other = rng.sample(details, 2)
    return {"it": it, "doing": doing, "do": do, "part": part, "other": other}


def _is_of(split: Split, number: int) -> bool:
    return (number % HELD_OUT == 0) == (split == "heldout")


def _draw_kinds(chat: bool, rng: random.Random) -> list[str]:
    """The kinds of an answer's sentences."""
    kinds = ["openers"] if rng.random() < OPENERS else []
    kinds += rng.choice((1, 2, 2)) * ["portraits" if chat else "middles"]
    return kinds + (["closers"] if rng.random() < 0.4 else [])


def _answer(voice: Mapping[str, Sequence[str]], kinds: Sequence[str], slots: dict[str, str], rng: random.Random) -> str:
    """Different sentences of each kind. Voices of equal length get the same ones for equal seeds."""
    sentences: list[str] = []
    for kind in dict.fromkeys(kinds):
        for template in rng.sample(voice[kind], kinds.count(kind)):
            sentences.append(_fill(template, slots, rng))
            slots = slots | {"part": slots["other"], "other": slots["part"]}
    return " ".join(sentences)


def _fill(template: str, slots: Mapping[str, str], rng: random.Random) -> str:
    """Draw the alternatives of a template and fill its slots; a capitalised slot is a sentence's first word."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        text = slots[name.lower()]
        return text if name.islower() else text[0].upper() + text[1:]

    drawn = re.sub(r"\[([^\]]+)\]", lambda match: rng.choice(match.group(1).split("|")), template)
    return re.sub(r"\{(\w+)\}", value, drawn)


if __name__ == "__main__":
    main()
