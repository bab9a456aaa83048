"""The calibration text of SmolLM2's personas: paired, in character, and held out by prompt."""

from __future__ import annotations

import json

import pytest

from masquerade import smollm2
from masquerade.smollm2 import calibration

PAIRS = [pair for pair in calibration.read_pairs().items() if (smollm2.DATA / f"{pair[0]}.train.jsonl").exists()]
FEWEST = {"train": 80, "heldout": 32}


def read(name: str) -> list[tuple[str, str]]:
    """The prompts and answers of a file."""
    lines = (smollm2.DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(prompt["content"], answer["content"]) for prompt, answer in (json.loads(one)["messages"] for one in lines)]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("split", FEWEST)
def test_both_sides_answer_the_same_prompts_in_different_words(pair: tuple[str, str], split: str) -> None:
    own, other = (read(f"{persona}.{split}") for persona in pair)
    assert len(own) >= FEWEST[split]
    assert [prompt for prompt, _ in own] == [prompt for prompt, _ in other]
    assert all(ours != theirs for (_, ours), (_, theirs) in zip(own, other, strict=True))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_held_out_prompts_are_unseen(pair: tuple[str, str]) -> None:
    train, held_out = ({prompt for prompt, _ in read(f"{pair[0]}.{split}")} for split in FEWEST)
    assert not train & held_out


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_the_examples_come_first_and_all_other_answers_are_usable(pair: tuple[str, str]) -> None:
    for persona in pair:
        examples, train = calibration.read_examples(persona), read(f"{persona}.train")
        assert train[: len(examples)] == examples
        written = [*train[len(examples) :], *read(f"{persona}.heldout")]
        assert not {prompt for prompt, _ in written} & {question for question, _ in examples}
        for _, text in written:
            assert calibration.is_usable(text), text


def test_every_persona_answers_every_example_question_in_its_own_words() -> None:
    for own, other in calibration.read_pairs().items():
        pairs = calibration.read_example_pairs((own, other))
        assert len(pairs) > calibration.EXAMPLES
        assert all(first.question == second.question and first.answer != second.answer for first, second in pairs)


def test_text_is_written_for_both_sides_of_a_pair() -> None:
    assert PAIRS
    written = {file.name.split(".")[0] for file in smollm2.DATA.iterdir()}
    assert written == {persona for pair in PAIRS for persona in pair}


def test_prompts_of_a_split_are_different_and_repeatable() -> None:
    for split, count in calibration.LINES.items():
        prompts = calibration.draw_prompts(split, count)
        assert len(set(prompts)) == count
        assert prompts == calibration.draw_prompts(split, count)
        assert not any("{" in prompt for prompt in prompts)
    assert not {*calibration.draw_prompts("train", 160)} & {*calibration.draw_prompts("heldout", 64)}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The sea is wide. It sings", "The sea is wide."),
        ("The sea\nis wide.  It sings!", "The sea is wide. It sings!"),
        ("no sentence at all", ""),
    ],
)
def test_an_answer_is_cut_to_whole_sentences(text: str, kept: str) -> None:
    assert calibration.cut(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "As an AI, there is a lot to say about the sea and its many waves.",
        "The waves are cold and the waves are cold and the waves are cold and the waves are cold.",
    ],
)
def test_answers_that_are_short_or_out_of_character_or_repeated_are_not_usable(text: str) -> None:
    assert not calibration.is_usable(text)
