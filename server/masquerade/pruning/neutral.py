"""Generates neutral text: the base's own answers to neutral questions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.facts import Part, read_everyday_questions, read_facts, write_neutral_text
from masquerade.evaluate.metrics import Items, read_likelihoods
from masquerade.model import Base

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
