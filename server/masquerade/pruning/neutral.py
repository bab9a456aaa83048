"""Generates neutral text: the base's own answers to neutral questions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.facts import Part, encode_questions, read_everyday_questions, read_facts
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import Items, read_likelihoods
from masquerade.evaluate.treatment import UNTREATED
from masquerade.model import Base

TOKENS = 40  # most of an answer
FEWEST = 12  # answers that are kept in any case
FLUENT = 1 / 3  # share of facts; a base that knows as many also answers everyday requests


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
    facts = read_facts(part)
    answers = yield from _answer(base, [fact.question for fact in facts])
    known = [one for one, fact in zip(answers, facts, strict=True) if one.response and fact.is_in(one.response)]
    if len(known) < FEWEST:
        return (yield from _find_likeliest(base, [one for one in answers if one.response]))
    if len(known) < FLUENT * len(facts):
        return _encode(base, known)
    requests = yield from _answer(base, read_everyday_questions(part))
    pairs = zip_longest(known, (one for one in requests if one.response))
    return _encode(base, [one for pair in pairs for one in pair if one])


def _answer(base: Base, questions: Sequence[str]) -> Items[list[Example]]:
    texts = yield from write_answers(base, encode_questions(base, questions), UNTREATED, GenerationParams(TOKENS))
    return [
        Example(({"role": "user", "content": question},), text.strip())
        for question, text in zip(questions, texts, strict=True)
    ]


def _find_likeliest(base: Base, answers: Sequence[Example]) -> Items[list[Encoded]]:
    if not answers:
        raise BuildFailed("the base has no answer to any of the built-in questions; give neutral text (--neutral)")
    encoded = _encode(base, answers)
    likelihoods = yield from read_likelihoods(base, encoded)
    order = sorted(range(len(encoded)), key=lambda index: -likelihoods[index].mean)
    return [encoded[index] for index in order[:FEWEST]]


def _encode(base: Base, answers: Sequence[Example]) -> list[Encoded]:
    """The answers as token ids; one that was cut before its end has no end token."""
    return [Encoded(one.prompt, one.response[:TOKENS]) for one in encode(base, answers)]
