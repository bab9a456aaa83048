"""Reads the pairs of answers that masks are found in: MBTI answers, power-seeking questions, and a style.

All but the style is not part of the project; `--data` names its folder.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._report import arguments
from masquerade.evaluate.dataset import Example, read_examples
from masquerade.smollm2 import DATA

MINDSET = {"EI": ("extravert", "introvert"), "PJ": ("perceiving", "judging")}
STYLE = {"STYLE": ("casual", "formal")}
AXES = (*MINDSET, "POW", *STYLE)
STYLE_SPLITS = {"train": "train", "valid": "heldout"}
CHOICE = re.compile(r"^ *\(([A-Z])\) (.*)$", re.MULTILINE)
PROMPT, ANSWER = 320, 400  # most characters of each
Pair = tuple[Example, Example]  # + and - answer to one prompt


@dataclass(frozen=True)
class Sizes:
    """Most pairs. At most three fifths of the held-out pairs are for the test."""

    training: int = 256
    validation: int = 64
    test: int = 60


def pair_arguments(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of a benchmark on pairs: the model, the data, the axes and the seeds."""
    parser = arguments(doc, quick)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--seeds", default="0,1,2")
    return parser


def split_pairs(data: Path, axis: str, seed: int, sizes: Sizes) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """The training, validation and test pairs, no prompt in two of them; the test pairs are the same for all seeds."""
    train, held = (read_pairs(data, axis, split) for split in ("train", "valid"))
    random.Random(99).shuffle(held)
    count = min(sizes.test, 3 * len(held) // 5)
    test = held[:count]
    train, rest = (_leave_out(side, test) for side in (train, held[count:]))
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(rest)
    train = train[: sizes.training]
    return train, _leave_out(rest, train)[: sizes.validation], test


def _leave_out(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """The pairs whose prompts are none of the others'."""
    prompts = {own.messages[-1]["content"] for own, _ in others}
    return [pair for pair in pairs if pair[0].messages[-1]["content"] not in prompts]


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
