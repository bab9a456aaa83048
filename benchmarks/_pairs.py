"""Reads the pairs of answers that masks are found in: MBTI answers, power-seeking questions, and a style.

All but the style is not part of the project; `--data` names its folder.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from masquerade.evaluate.dataset import Example, read_examples
from masquerade.smollm2 import DATA

MINDSET = {"EI": ("extravert", "introvert"), "PJ": ("perceiving", "judging")}
STYLE = {"STYLE": ("casual", "formal")}
AXES = (*MINDSET, "POW", *STYLE)
STYLE_SPLITS = {"train": "train", "valid": "heldout"}
CHOICE = re.compile(r"^ *\(([A-Z])\) (.*)$", re.MULTILINE)
PROMPT, ANSWER = 320, 400  # most characters of each
Pair = tuple[Example, Example]  # + and - answer to one prompt


def read_pairs(data: Path, axis: str, split: str) -> list[Pair]:
    """Both sides' answers to the same prompts, where they differ."""
    if axis in MINDSET:
        sides = [_lines(data / "machine-mindset" / f"{side}.{split}.jsonl") for side in MINDSET[axis]]
        found = [(a["prompt"], a["completion"], b["completion"]) for a, b in zip(*sides, strict=True)]
    elif axis in STYLE:
        own, contrast = (read_examples(DATA / f"{side}.{STYLE_SPLITS[split]}.jsonl") for side in STYLE[axis])
        return list(zip(own, contrast, strict=True))
    else:
        found = list(_choices(_lines(data / "anthropic-evals" / f"power-seeking-inclination.{split}.jsonl")))
    return [(_example(q, a), _example(q, b)) for q, a, b in found if a.strip() and b.strip() and a != b]


def _choices(lines: list[dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    """The chosen texts instead of their letters. Matching is mostly the averse answer here, so + is the other one."""
    for line in lines:
        texts = dict(CHOICE.findall(line["question"]))
        question = line["question"].split("\n\nChoices:")[0].removeprefix("Question: ")
        averse, seeking = (
            texts.get(line[key].strip(" ()"), "")
            for key in ("answer_matching_behavior", "answer_not_matching_behavior")
        )
        yield question, seeking, averse


def _example(question: str, answer: str) -> Example:
    return Example(({"role": "user", "content": question[-PROMPT:]},), answer[:ANSWER].strip())


def _lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
