"""The neutral questions of the package, and the check of an answer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masquerade.evaluate import generation
from masquerade.evaluate.facts import (
    TOKENS,
    Fact,
    Part,
    check_facts,
    encode_questions,
    find_known_facts,
    read_everyday_questions,
    read_facts,
    share_kept,
)
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world


def test_there_are_as_many_questions_as_promised_and_no_two_alike() -> None:
    facts, everyday = read_facts(), read_everyday_questions()
    assert len(facts) == 200
    assert len(everyday) == 96
    assert max(Counter([*(fact.question for fact in facts), *everyday]).values()) == 1


def test_no_question_contains_its_own_answer() -> None:
    """Or an echo of the question would count as knowledge."""
    assert [fact.question for fact in read_facts() if fact.is_in(fact.question)] == []


@pytest.mark.parametrize("read", [read_facts, read_everyday_questions])
def test_the_halves_are_disjoint_and_complete(read: object) -> None:
    parts: tuple[Part, ...] = ("search", "report")
    search, report = (read(part) for part in parts)  # type: ignore[operator]
    assert len(search) == len(report)
    assert not set(search) & set(report)
    assert set(search) | set(report) == set(read())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("answers", "text", "known"),
    [
        (("Paris",), "The capital of France is Paris.", True),
        (("Paris",), "PARIS!", True),
        (("Paris",), "Parisian cafés are lovely", False),
        (("5", "five"), "2 + 3 = 5.", True),
        (("5", "five"), "Five, of course", True),
        (("5", "five"), "15 or 52 or 5.2 or 1.5 or 5,000", False),
        (("100",), "It is 100, I think", True),
        (("carbon dioxide", "CO2"), "They take in carbon dioxide", True),
        (("H2O",), "", False),
    ],
)
def test_an_answer_counts_as_whole_words_in_any_case(answers: tuple[str, ...], text: str, known: bool) -> None:
    assert Fact("?", answers).is_in(text) is known


@given(
    st.sampled_from([("Paris",), ("5", "five"), ("H2O", "water")]),
    st.text("Paris25.,H20water fiveé\ufffd ", max_size=12),
)
def test_a_fact_is_settled_if_it_is_in_whatever_follows(answers: tuple[str, ...], text: str) -> None:
    fact, ends = Fact("?", answers), ["", "s", "5", ".", ".5", ",", ",000", "é", " ", " and more"]
    if fact.is_settled(text):
        assert all(fact.is_in(text.rstrip("\ufffd") + end) for end in ends)
    elif fact.is_in(text + " ."):
        assert fact.is_settled(text + " .")


def test_an_answer_ends_where_its_fact_is_settled(tiny: Base, manager: MaskManager) -> None:
    """It is the beginning of the whole answer, and the others are as they were."""
    prompts = encode_questions(tiny, [f"what is {number}" for number in range(6)])
    whole = finish(write_answers(tiny, prompts, params=GenerationParams(TOKENS)))
    asked: list[int] = []

    def suffices(number: int, text: str) -> bool:
        asked.append(number)
        return number % 2 == 1 and len(text) > 5

    cut = finish(write_answers(tiny, prompts, params=GenerationParams(TOKENS, rows=4), suffices=suffices))
    assert set(asked) == set(range(6))
    for number, (text, long) in enumerate(zip(cut, whole, strict=True)):
        assert long.startswith(text.rstrip("\ufffd"))  # the beginning of a character
        assert (text == long) == (number % 2 == 0)


def test_facts_are_checked_in_greedy_answers(tiny: Base, manager: MaskManager) -> None:
    """The first word of the base's own answer is known to the base; what it did not say is not."""
    questions = ["what is one", "what is two", "what is three"]
    prompts = encode_questions(tiny, questions)
    texts = finish(write_answers(tiny, prompts, params=GenerationParams(TOKENS)))
    facts = [Fact(questions[0], (texts[0],)), Fact(questions[1], ("never said",)), Fact(questions[2], (texts[2],))]
    known = finish(check_facts(tiny, facts))
    assert known == [fact.is_in(text) for fact, text in zip(facts, texts, strict=True)]
    assert not known[1]
    treatment = Treatment(applied=AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=3)), 0.0))
    changed = finish(write_answers(tiny, prompts, treatment, GenerationParams(TOKENS)))
    assert finish(check_facts(tiny, facts, treatment)) == [
        fact.is_in(text) for fact, text in zip(facts, changed, strict=True)
    ]


@pytest.mark.parametrize("alone", [False, True], ids=["transformers decodes", "the native layers decode"])
def test_a_fact_is_known_if_it_is_answered_in_a_large_and_in_a_small_batch(
    tiny: Base, manager: MaskManager, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if rounding changed the answers of a small batch, which the native layers' are not asked in."""
    monkeypatch.setattr("masquerade.evaluate.facts.find_native_stack", lambda *_: True if alone else None)
    questions = ["what is one", "what is two", "what is three", "what is four", "what is five"]
    prompts = encode_questions(tiny, questions)
    texts = finish(write_answers(tiny, prompts, params=GenerationParams(TOKENS)))
    facts = [Fact(question, (text,)) for question, text in zip(questions, texts, strict=True)]
    facts[3] = Fact(questions[3], ("never said",))
    assert finish(find_known_facts(tiny, facts)) == [True, True, True, False, True]
    run = generation._Batch.run

    def run_otherwise(batch: generation._Batch) -> Any:
        found = yield from run(batch)
        return [ids[1:] for ids in found] if batch.params.rows < len(facts) else found

    monkeypatch.setattr(generation._Batch, "run", run_otherwise)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # which has no answers yet
    assert finish(find_known_facts(tiny, facts)) == [alone, alone, alone, False, alone]


def test_the_share_that_is_kept_is_of_what_was_known() -> None:
    assert share_kept([True, True, False, False], [True, False, True, False]) == 0.5
    assert share_kept([False], [True]) is None
