"""Writes the calibration text of SmolLM2's personas, with the model: `python -m masquerade.smollm2.calibration`.

The model answers as a persona because example chats of the persona precede the prompt. What is written has the prompt
without them; they are the first lines of `train`. Of several answers the one is kept that a classifier finds most like
the persona. Line N of a persona's file and line N of its opposite's answer the same prompt.
"""

from __future__ import annotations

import random
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from masquerade import smollm2
from masquerade.demo.calibration import write_turns
from masquerade.demo.grammar import Split, Turn
from masquerade.engine import Engine, Request, SamplingParams
from masquerade.evaluate.judge import PersonaClassifier
from masquerade.evaluate.repetition import loops, measure_distinct
from masquerade.model import Base, load, render_chat

LINES: Mapping[Split, int] = {"train": 128, "heldout": 64}  # prompts; those without a usable answer are left out
CHATS = 0.25  # share of prompts without a topic
HELD_OUT = 4  # one in so many chats is for held-out prompts only
EXAMPLES = 5  # chats before a prompt
CONTEXTS = 6  # different choices of them
ANSWERS = 3  # of which one is kept
TOKENS = 56  # of an answer
TEMPERATURE, TOP_P = 0.7, 0.9
FREQUENCY_PENALTY, PRESENCE_PENALTY = 0.6, 0.4  # without them, answers repeat phrases, and so do the masks' answers
SHORTEST = 12  # words of an answer
LEAST_DISTINCT = {1: 0.6, 3: 0.95}  # least share of distinct words and 3-grams of an answer
QUEUED = 192  # requests that the engine gets at a time
EXAMPLE_WEIGHT = 4  # of the examples beside generated answers, for the classifier

_OUT_OF_CHARACTER = re.compile(
    r"chatbot|language model|\bAI\b|artificial|as an? (assistant|virtual)|assist you|help you with|sorry for"
    r"|don.t know|not sure",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Candidates:
    """The usable answers of both personas of a pair to a prompt."""

    prompt: str
    own: Sequence[str]
    other: Sequence[str]


def main() -> None:
    """Write `<persona>.train.jsonl` and `<persona>.heldout.jsonl` of all pairs, or of those whose first is given."""
    pairs = read_pairs()
    chosen = {own: pairs[own] for own in sys.argv[1:]} or pairs
    smollm2.DATA.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base = load("smollm2", device="cpu", dtype="bfloat16")
    for pair in chosen.items():
        for split, turns in write_pairs(base, pair, LINES).items():
            print(f"{pair[0]}, {pair[1]}: {len(turns)} {split} pairs", file=sys.stderr, flush=True)
            for side, persona in enumerate(pair):
                write_turns(smollm2.DATA / f"{persona}.{split}.jsonl", (turn[side] for turn in turns))


def read_pairs() -> dict[str, str]:
    """Persona -> its opposite."""
    pairs: dict[str, str] = _words()["pairs"]
    return pairs


def read_examples(persona: str) -> list[tuple[str, str]]:
    """The example questions, and the persona's answers to them."""
    return list(zip(_words()["questions"], _words()["voices"][persona], strict=True))


def read_example_pairs(personas: tuple[str, str]) -> list[tuple[Turn, Turn]]:
    """Both personas' answers to the example questions."""
    own, other = ([Turn(*one) for one in read_examples(persona)] for persona in personas)
    return list(zip(own, other, strict=True))


def write_pairs(
    base: Base, personas: tuple[str, str], lines: Mapping[Split, int]
) -> dict[Split, list[tuple[Turn, Turn]]]:
    """Both personas' answers to the same prompts, by split; at most `lines` of them, after the examples in `train`."""
    engine = Engine(base)
    found = {}
    for split, count in lines.items():
        prompts = draw_prompts(split, count)
        own, other = (list(answer(engine, persona, prompts, split)) for persona in personas)
        usable = (Candidates(*one) for one in zip(prompts, own, other, strict=True))
        found[split] = [one for one in usable if one.own and one.other]
    engine.stop()
    judge = _train_judge(personas, found["train"])
    chosen = {split: [_choose(judge, one) for one in candidates] for split, candidates in found.items()}
    chosen["train"] = [*read_example_pairs(personas), *chosen["train"]]
    return chosen


def draw_prompts(split: Split, count: int) -> list[str]:
    """Different prompts: chats, and templates filled with topics."""
    words, rng = _words(), random.Random(split)
    chats = [one for number, one in enumerate(words["chats"]) if (number % HELD_OUT == 0) == (split == "heldout")]
    found: dict[str, None] = dict.fromkeys(rng.sample(chats, min(len(chats), round(CHATS * count))))
    while len(found) < count:
        slots = dict(zip(("it", "doing", "do"), rng.choice(words["topics"][split]), strict=True))
        found[rng.choice(words["prompts"]).format(**slots)] = None
    return list(found)


def answer(engine: Engine, persona: str, prompts: Sequence[str], seed: str) -> Iterator[list[str]]:
    """The usable ones of `ANSWERS` answers to each prompt."""
    rng = random.Random(seed)
    contexts = [rng.sample(read_examples(persona), EXAMPLES) for _ in range(CONTEXTS)]
    tokenizer, ends = engine.base.tokenizer, engine.base.ends
    rendered = [_render(engine.base, contexts[n % CONTEXTS], prompt) for n, prompt in enumerate(prompts)]
    params = SamplingParams(
        temperature=TEMPERATURE,
        top_p=TOP_P,
        frequency_penalty=FREQUENCY_PENALTY,
        presence_penalty=PRESENCE_PENALTY,
    )
    requests = (
        Request(rendered[number // ANSWERS], TOKENS, lambda _: None, sampling=replace(params, seed=number), ends=ends)
        for number in range(ANSWERS * len(prompts))
    )
    texts: list[str] = []
    while batch := list(islice(requests, QUEUED)):
        texts += [cut(tokenizer.decode(ids, skip_special_tokens=True)) for ids in engine.generate(batch)]
    for number in range(0, len(texts), ANSWERS):
        yield [text for text in dict.fromkeys(texts[number : number + ANSWERS]) if is_usable(text)]


def cut(text: str) -> str:
    """The whole sentences of an answer, on one line."""
    text = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    return text[: ends[-1]] if ends else ""


def is_usable(text: str) -> bool:
    """Whether an answer is long enough, does not repeat itself, and does not speak of the model."""
    distinct = {size: measure_distinct([text], size) for size in LEAST_DISTINCT}
    return (
        len(text.split()) >= SHORTEST
        and not loops(text)
        and not _OUT_OF_CHARACTER.search(text)
        and all((share or 0.0) >= LEAST_DISTINCT[size] for size, share in distinct.items())
    )


def _render(base: Base, examples: Sequence[tuple[str, str]], prompt: str) -> list[int]:
    messages = [
        {"role": role, "content": content}
        for example in examples
        for role, content in zip(("user", "assistant"), example, strict=True)
    ]
    return render_chat(base.tokenizer, [*messages, {"role": "user", "content": prompt}])


def _train_judge(personas: tuple[str, str], candidates: Sequence[Candidates]) -> PersonaClassifier:
    own, other = ([text for _, text in read_examples(persona)] * EXAMPLE_WEIGHT for persona in personas)
    for one in candidates:
        own += one.own
        other += one.other
    return PersonaClassifier(own, other)


def _choose(judge: PersonaClassifier, candidates: Candidates) -> tuple[Turn, Turn]:
    own = max(candidates.own, key=lambda text: judge.score(candidates.prompt, text))
    other = min(candidates.other, key=lambda text: judge.score(candidates.prompt, text))
    return Turn(candidates.prompt, own), Turn(candidates.prompt, other)


@cache
def _words() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
