"""Neutral questions that come with this package: facts with checkable answers, everyday requests, short questions.

`data/facts.jsonl` and `data/everyday.jsonl` are in mixed order: each prefix, and each half, has questions of every
kind. The even lines (`search`) are for whoever looks for a mask, the odd lines (`report`) for whoever measures it, so a
mask is never chosen by the questions that it is judged by. `data/short.jsonl` has more questions with short answers,
for a search only; none is among those for a report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import Items
from masquerade.evaluate.paged import find_native_stack
from masquerade.evaluate.recall import recall_answers
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base

Part = Literal["search", "report", "all"]
TOKENS = 40  # of an answer to a fact's question; it is greedy
ROWS, ROWS_AGAIN = 64, 4  # questions of a batch, and where the base is asked again
LOOKAHEAD = 2  # characters after an answer that decide whether it is a whole word or number
NEUTRAL_TOKENS = 48  # of an answer that is neutral text
_LINES: dict[Part, slice] = {"search": slice(0, None, 2), "report": slice(1, None, 2), "all": slice(None)}


@dataclass(frozen=True)
class Fact:
    """A question, and the strings of which an answer must contain one."""

    question: str
    answers: tuple[str, ...]

    def is_in(self, text: str) -> bool:
        """Whether a text has one of the answers, as whole words and in any case; 5 is in "5." but not in "15"."""
        return any(self._find(text))

    def is_settled(self, text: str) -> bool:
        """Whether every text that begins with this one has one of the answers."""
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the beginning of a character, whose bytes are not all there
        return any(match.end() + LOOKAHEAD <= len(whole) for match in self._find(whole))

    def _find(self, text: str) -> Iterator[re.Match[str]]:
        accepted = "|".join(map(re.escape, self.answers))
        return re.finditer(rf"(?<!\w)(?<!\d[.,])(?:{accepted})(?!\w)(?![.,]\d)", text, re.IGNORECASE)


def read_facts(part: Part = "all") -> list[Fact]:
    """The 200 facts, or the half of them for one purpose."""
    return [Fact(line["question"], tuple(line["answers"])) for line in _read("facts.jsonl", part)]


def read_everyday_questions(part: Part = "all") -> list[str]:
    """The 96 open-ended requests, or the half of them for one purpose."""
    return [line["question"] for line in _read("everyday.jsonl", part)]


def read_short_questions() -> list[str]:
    """Questions with short answers that are not checked, for a search."""
    return [line["question"] for line in _read("short.jsonl", "all")]


def read_search_questions() -> list[str]:
    """All neutral questions for a search: everyday requests, facts, and short questions."""
    facts = [fact.question for fact in read_facts("search")]
    return [*read_everyday_questions("search"), *facts, *read_short_questions()]


def encode_questions(base: Base, questions: Iterable[str]) -> list[Encoded]:
    """Questions as prompts of a chat, to generate answers to; their responses are placeholders."""
    return encode(base, [Example(({"role": "user", "content": question},), "?") for question in questions])


def check_facts(
    base: Base, facts: Sequence[Fact], treatment: Treatment = UNTREATED, rows: int = ROWS
) -> Items[list[bool]]:
    """Whether each fact is in the greedy answer to its question; a work item is a pass of the model.

    A batch has at most `rows` questions, and with a treatment an answer ends where its fact is settled. The base must
    have its masks attached.
    """
    prompts = encode_questions(base, [fact.question for fact in facts])
    params = GenerationParams(TOKENS, rows=rows)
    if treatment is UNTREATED:
        texts = yield from recall_answers(base, prompts, params)
    else:
        texts = yield from write_answers(base, prompts, treatment, params, lambda at, text: facts[at].is_settled(text))
    return [fact.is_in(text) for fact, text in zip(facts, texts, strict=True)]


def find_known_facts(base: Base, facts: Sequence[Fact], untreated: Treatment = UNTREATED) -> Items[list[bool]]:
    """Whether the base knows each fact: it answers it in a large batch and, unless its answers are the same in any
    batch, in a small one.

    Where transformers decodes in half precision, the composition of a batch changes the last bits of a product. An
    answer that changes with it is no knowledge that a treatment could keep. `untreated` may be `HOOKED`, for a
    treatment that is computed so. A work item is a pass of the model.
    """
    right = yield from check_facts(base, facts, untreated)
    if find_native_stack(base, untreated) is not None:
        return right
    known = [fact for fact, is_right in zip(facts, right, strict=True) if is_right]
    again = yield from check_facts(base, known, untreated, ROWS_AGAIN)
    kept = {fact.question for fact, is_right in zip(known, again, strict=True) if is_right}
    return [fact.question in kept for fact in facts]


def write_neutral_text(base: Base, questions: Iterable[str], tokens: int = NEUTRAL_TOKENS) -> Items[list[Encoded]]:
    """The base's greedy answers to questions, as text of which the likelihood is to stay; empty ones are left out.

    An answer that was cut at `tokens` tokens has no token for its end. A work item is a pass of the model.
    """
    prompts = encode_questions(base, questions)
    texts = yield from recall_answers(base, prompts, GenerationParams(tokens))
    answered = [Example(one.messages, text) for one, text in zip(prompts, texts, strict=True) if text]
    return [one.cut(tokens) for one in encode(base, answered)]


def share_kept(before: Sequence[bool], after: Sequence[bool]) -> float | None:
    """Of the facts that were known before, the share that is known after; None if none was known."""
    known = [later for earlier, later in zip(before, after, strict=True) if earlier]
    return sum(known) / len(known) if known else None


def _read(name: str, part: Part) -> list[dict[str, Any]]:
    lines = (files(__package__) / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[_LINES[part]]]
