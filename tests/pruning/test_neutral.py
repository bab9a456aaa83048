"""Neutral text beyond the built-in questions: what the base writes itself, and when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from masquerade.errors import UnusableModel
from masquerade.evaluate.facts import read_everyday_questions, read_facts, read_short_questions
from masquerade.evaluate.metrics import finish
from masquerade.model import Base, MaskManager, load, open_user_message
from masquerade.packaged import find_packaged
from masquerade.pruning import neutral
from tests.world import make_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    base = load(str(make_model(Path(tmp_path_factory.mktemp("tiny")))))
    MaskManager.attach(base.model)
    return base


def test_a_chat_is_opened_up_to_the_first_message(tiny: Base) -> None:
    assert tiny.tokenizer.decode(open_user_message(tiny.tokenizer)) == "<|bos|><|user|>"


def test_without_a_chat_template_the_base_writes_no_questions(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    assert open_user_message(tiny.tokenizer) == []
    assert finish(neutral.write_questions(tiny, 0)) == []


def test_questions_are_different_whole_and_repeatable(tiny: Base) -> None:
    """A random model writes random bytes; a few of its messages end in a full stop."""
    questions = finish(neutral.write_questions(tiny, 0))
    assert questions == finish(neutral.write_questions(tiny, 0))
    assert questions != finish(neutral.write_questions(tiny, 1))
    assert len(questions) == len(set(questions)) <= neutral.WRITTEN
    assert all(question[-1] in ".?!" for question in questions)


def test_a_base_without_answers_to_everyday_requests_gives_no_more_text(tiny: Base) -> None:
    texts = finish(neutral.generate_neutral_text(tiny, "search"))
    assert finish(neutral.generate_more_neutral_text(tiny, texts, 0)) == []


def test_short_questions_are_not_among_those_that_judge() -> None:
    judging = {*(fact.question for fact in read_facts("report")), *read_everyday_questions("report")}
    assert not judging & {*read_short_questions()}


@pytest.mark.real
def test_a_real_model_writes_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        find_packaged("smollm2")
    except UnusableModel as error:
        pytest.skip(str(error))
    base = load("smollm2", device="cpu", dtype="bfloat16")
    MaskManager.attach(base.model)
    monkeypatch.setattr(neutral, "WRITTEN", 16)
    questions = finish(neutral.write_questions(base, 0))
    assert len(questions) >= 8
    assert sum("?" in question for question in questions) >= 4
