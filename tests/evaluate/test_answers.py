"""Chats, neutral text, and the figures that compare answers with the base's."""

from __future__ import annotations

import pytest

from masquerade.evaluate.answers import TURNS, Answers, Questions, chat, compare_answers, plan_chats
from masquerade.evaluate.dataset import Example, Message, encode
from masquerade.evaluate.facts import Fact, encode_questions, write_neutral_text
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import finish, likelihoods
from masquerade.evaluate.treatment import Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

EVERYDAY = [f"everyday {index}" for index in range(7)]
PARAMS = GenerationParams(tokens=4)


class Exclamations:
    """Gives answers with an exclamation mark to the persona."""

    def score(self, _: str, answer: str) -> float:
        return answer.count("!") - 0.5


def say(text: str) -> Message:
    return {"role": "user", "content": text}


def test_each_turn_of_a_chat_sees_the_turns_before(tiny: Base, manager: MaskManager) -> None:
    treatment = Treatment(applied=AppliedMask(manager.fit(world.make_mask(tiny, 0.2, seed=3)), 0.0))
    first, second = finish(chat(tiny, [[say("one"), say("two")], [say("other"), say("two")]], treatment, PARAMS))
    history = [say("one"), {"role": "assistant", "content": first[0]}, say("two")]
    alone = finish(write_answers(tiny, encode(tiny, [Example(tuple(history), "?")]), treatment, PARAMS))
    assert alone == first[1:]
    assert len(second) == 2


def test_a_chat_that_outgrows_the_context_goes_on_without_its_oldest_turns(tiny: Base, manager: MaskManager) -> None:
    long = [say(f"{turn}" * 100) for turn in range(5)]
    (answers,) = finish(chat(tiny, [long], params=PARAMS))
    assert len(answers) == 5
    history = [long[3], {"role": "assistant", "content": answers[3]}, long[4]]
    assert [answers[4]] == finish(write_answers(tiny, encode(tiny, [Example(tuple(history), "?")]), params=PARAMS))


def test_chats_begin_with_a_held_out_prompt_and_differ(tiny: Base) -> None:
    chats = plan_chats(Questions(encode_questions(tiny, ["a", "b"]), EVERYDAY, chats=3))
    assert [turns[0]["content"] for turns in chats] == ["a", "b", "a"]
    for asked in zip(*chats, strict=True):
        assert len({message["content"] for message in asked}) > 1
    assert {len(turns) for turns in chats} == {TURNS}
    assert plan_chats(Questions(encode_questions(tiny, ["a"]), EVERYDAY[:3], chats=3)) == []


def test_answers_are_counted_beside_the_bases(tiny: Base) -> None:
    facts = [Fact("?", ("x",))] * 3
    questions = Questions(encode_questions(tiny, ["a", "b", "c", "d"]), EVERYDAY[:2], facts)
    before = Answers(["one", "two", "three", "four"], ["well", "so"], [True, True, False])
    after = Answers(["one!", "two", "no " * 12, "yes! yes"], ["well", "oh"], [True, False, True])
    found = compare_answers(questions, before, after, Exclamations())
    assert (found["hit"], found["differing"], found["everyday_differing"]) == (0.5, 0.75, 0.5)
    assert found["loops"] == pytest.approx(1 / 6)
    assert found["facts"] == {"of": 3, "known": 2, "kept": 0.5}
    assert 0 < found["distinct_2"] < 1
    assert found["intervals"]["hit"][0] < 0.5 < found["intervals"]["hit"][1]
    assert "hit" not in compare_answers(questions, before, after, None)
    assert "drift" not in found


def test_hits_are_counted_by_turn(tiny: Base) -> None:
    questions = Questions(encode_questions(tiny, ["a", "b"]), EVERYDAY, chats=2)
    said = [["!", "!", "", "!", "", ""], ["!", "", "", "!", "", "!"]]
    blank = Answers(["", ""], [""] * 7, (), said)
    assert compare_answers(questions, blank, blank, Exclamations())["drift"] == [1.0, 0.5, 0.0, 1.0, 0.0, 0.5]


def test_neutral_text_is_what_the_base_says_and_has_no_end_where_it_was_cut(tiny: Base, manager: MaskManager) -> None:
    texts = finish(write_neutral_text(tiny, ["what is one", "what is two"], tokens=6))
    answers = finish(
        write_answers(tiny, encode_questions(tiny, ["what is one", "what is two"]), params=GenerationParams(6))
    )
    for one, answer in zip(texts, (answer for answer in answers if answer), strict=True):
        assert answer.startswith(tiny.tokenizer.decode(one.response, skip_special_tokens=True))
        assert len(one.response) <= 6
    assert all(one.mean < 0 for one in likelihoods(tiny, texts))
