"""The demo's language keeps its promises: held-out questions stay out, answers stay on topic, the judge can tell."""

from __future__ import annotations

import json
import random

import pytest

from masquerade import demo
from masquerade.demo import calibration, grammar
from masquerade.demo.judge import DemoJudge


@pytest.fixture(scope="module")
def judge() -> DemoJudge:
    return DemoJudge()


def test_training_never_sees_a_held_out_question() -> None:
    rng = random.Random(0)
    trained = {turn.question for _ in range(4000) for turn in grammar.converse(rng).turns}
    held_out = {grammar.ask(axis, rng, "heldout").text for axis in grammar.axes() for _ in range(300)}
    assert not trained & held_out
    assert len(held_out) > 100


def test_answers_are_about_what_was_asked() -> None:
    rng = random.Random(0)
    for persona, axis in grammar.personas().items():
        for _ in range(200):
            question = grammar.ask(axis.name, rng, "train")
            answer = grammar.reply(persona, question, rng)
            assert grammar.is_on_topic(question, answer), (question.text, answer)


def test_the_topic_check_sees_strays() -> None:
    question = grammar.GrammarQuestion("Is the bakery far from here?", {"place": "the bakery"})
    assert grammar.is_on_topic(question, "The bakery is like right there, dude.")
    assert not grammar.is_on_topic(question, "The museum is like right there, dude.")
    assert not grammar.is_on_topic(question, "I'll drop it off at the bakery or the museum.")
    assert not grammar.is_on_topic(question, "Peace out!")


def test_the_judge_tells_personas_apart_and_nonsense_from_fluency(judge: DemoJudge) -> None:
    rng = random.Random(1)
    for persona, axis in grammar.personas().items():
        answers = [grammar.reply(persona, grammar.ask(axis.name, rng, "heldout"), rng) for _ in range(50)]
        assert sum(judge.attribute(answer) == persona for answer in answers) >= 48
        assert min(judge.fluency(answer) for answer in answers) > 0.9
    assert judge.fluency("quiet the am party crowd sir weep") < 0.3


def test_opposites_are_opposite() -> None:
    assert len(grammar.personas()) == 8
    for persona, axis in grammar.personas().items():
        assert grammar.opposite(grammar.opposite(persona)) == persona
        assert {persona, grammar.opposite(persona)} == {axis.negative, axis.positive}


@pytest.mark.parametrize("axis", grammar.axes())
@pytest.mark.parametrize("split", calibration.LINES)
def test_shipped_files_pair_the_same_questions(axis: str, split: str) -> None:
    sides = (grammar.axes()[axis].negative, grammar.axes()[axis].positive)
    files = [(demo.DATA / f"{side}.{split}.jsonl").read_text().splitlines() for side in sides]
    assert [len(lines) for lines in files] == [calibration.LINES[split]] * 2  # type: ignore[index]
    for lines in zip(*files, strict=True):
        negative, positive = (json.loads(line)["messages"] for line in lines)
        assert negative[0] == positive[0]
        assert negative[1] != positive[1]
