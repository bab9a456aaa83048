"""Writes the demo personas' JSONL: `python -m masquerade.demo.calibration`.

Line N of a persona's file and line N of its opposite's answer the same question.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from masquerade import demo
from masquerade.demo import grammar

LINES: dict[grammar.Split, int] = {"train": 256, "heldout": 60}


def main() -> None:
    """Write `<persona>.train.jsonl` and `<persona>.heldout.jsonl` for all personas, and `facts.jsonl`."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else demo.DATA
    folder.mkdir(parents=True, exist_ok=True)
    for axis in grammar.axes().values():
        for split, count in LINES.items():
            pairs = list(_pairs(axis, split, count))
            write_turns(folder / f"{axis.negative}.{split}.jsonl", (negative for negative, _ in pairs))
            write_turns(folder / f"{axis.positive}.{split}.jsonl", (positive for _, positive in pairs))
    write_turns(folder / "facts.jsonl", grammar.facts())


def _pairs(axis: grammar.Axis, split: grammar.Split, count: int) -> Iterator[tuple[grammar.Turn, grammar.Turn]]:
    """Both personas' answers to the same questions; a quarter of the calibration questions has no axis."""
    rng = random.Random(f"{axis.name} {split}")
    for _ in range(count):
        off_axis = split == "train" and rng.random() < 0.25
        question = grammar.ask_anything(rng) if off_axis else grammar.ask(axis.name, rng, split)
        slots = {} if off_axis else question.slots
        on_axis = grammar.GrammarQuestion(question.text, slots)
        negative, positive = (grammar.reply(persona, on_axis, rng) for persona in (axis.negative, axis.positive))
        yield grammar.Turn(question.text, negative), grammar.Turn(question.text, positive)


def write_turns(path: Path, turns: Iterable[grammar.Turn]) -> None:
    """Write a JSONL file with a chat of one turn a line."""
    lines = [
        {"messages": [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]}
        for turn in turns
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
