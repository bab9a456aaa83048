"""Generates neutral text: the base's own answers to neutral questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.facts import (
    Part,
    read_everyday_questions,
    read_facts,
    read_short_questions,
    write_neutral_text,
)
from masquerade.evaluate.generation import GenerationParams
from masquerade.evaluate.metrics import Items, read_likelihoods
from masquerade.evaluate.recall import recall_answers
from masquerade.model import Base, open_user_message

FEWEST = 12  # answers that are kept in any case
FLUENT = 1 / 3  # share of facts; a base that knows as many also answers everyday requests
WRITTEN = 256  # most questions that the base writes itself
WRITTEN_TOKENS = 48  # of such a question
WRITTEN_TEMPERATURE = 0.7
# What half of the written questions begin with: the base asks for help by itself, and seldom for a fact
OPENINGS = (
    "What is the", "What is", "Who", "Where", "When", "Which", "How many", "What do you call", "What colour is",
    "In which country", "What does", "Name a", "How long", "What is the opposite of", "Is", "Who wrote",
)  # fmt: skip
_WHOLE = re.compile(r"\S.*[.?!]", re.DOTALL)


def generate_neutral_texts(base: Base, parts: Sequence[Part]) -> Items[list[list[Encoded]]]:
    """The neutral text of each part."""
    found: list[list[Encoded]] = []
    for part in parts:
        texts = yield from generate_neutral_text(base, part)
        found.append(texts)
    return found


def generate_neutral_text(base: Base, part: Part) -> Items[list[Encoded]]:
    """The base's greedy answers to facts that it knows, and to everyday requests if it knows the share `FLUENT` of all.

    A base that knows few facts has no answers to requests: it speaks in the manner of some persona, which a mask is
    meant to change. At least `FEWEST` answers to facts are kept, those of lowest perplexity. A work item is a pass of
    the model.
    """
    facts = {fact.question: fact for fact in read_facts(part)}
    answers = yield from write_neutral_text(base, facts)
    if not answers:
        raise BuildFailed("the base has no answer to any of the built-in questions; give neutral text (--neutral)")
    known = [
        one for one in answers if facts[one.messages[-1]["content"]].is_in(base.tokenizer.decode(list(one.response)))
    ]
    if len(known) < FEWEST:
        likelihoods = yield from read_likelihoods(base, answers)
        order = sorted(range(len(answers)), key=lambda index: -likelihoods[index].mean)
        return [answers[index] for index in order[:FEWEST]]
    if len(known) < FLUENT * len(facts):
        return known
    requests = yield from write_neutral_text(base, read_everyday_questions(part))
    return [one for pair in zip_longest(known, requests) for one in pair if one]


def generate_more_neutral_text(base: Base, texts: Sequence[Encoded], seed: int) -> Items[list[Encoded]]:
    """More texts beside those of the part `search`, so that a search does not keep these few and harm all others.

    They are the base's greedy answers to short questions, and to questions that it writes itself, without those that
    certificates are measured on. There are none if the base answers no everyday requests. A work item is a pass of the
    model.
    """
    everyday = {*read_everyday_questions("search")}
    if not any(one.messages[-1]["content"] in everyday for one in texts):
        return []
    reported = {*read_everyday_questions("report"), *(fact.question for fact in read_facts("report"))}
    questions = [one for one in (yield from write_questions(base, seed)) if one not in reported]
    return (yield from write_neutral_text(base, [*read_short_questions(), *sorted(questions, key=len)]))  # less padding


def write_questions(base: Base, seed: int) -> Items[list[str]]:
    """At most `WRITTEN` different messages of users, sampled from the base; none without a chat template.

    An instruct model that continues its chat template from where a user's message begins writes one (Magpie, Xu et al.,
    arXiv 2406.08464); half of the messages begin with one of the `OPENINGS`. Those that end without a full stop were
    cut, and are left out.
    """
    opening = open_user_message(base.tokenizer)
    if not opening:
        return []
    starts = [OPENINGS[number // 2 % len(OPENINGS)] if number % 2 else "" for number in range(WRITTEN)]
    prompts = [Encoded((*opening, *base.tokenizer.encode(start, add_special_tokens=False)), ()) for start in starts]
    texts = yield from recall_answers(base, prompts, GenerationParams(WRITTEN_TOKENS, WRITTEN_TEMPERATURE, seed))
    questions = [f"{start} {text}".strip() for start, text in zip(starts, texts, strict=True)]
    return [question for question in dict.fromkeys(questions) if _WHOLE.fullmatch(question)]
