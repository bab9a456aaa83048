"""No example does two jobs; opposites keep their prompts in common; the same files give the same split."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example
from masquerade.evaluate.splits import check_contrast, count_within, divide, divide_neutral, match, mix, sample


def talk(words: int, count: int = 40, prompts: int = 20) -> list[Encoded]:
    return [Encoded((1, 10 + index % prompts), (words, 100 + index)) for index in range(count)]


def prompts(examples: object) -> set[tuple[int, ...]]:
    return {example.prompt for example in examples}  # type: ignore[attr-defined]


def test_what_is_held_out_is_held_out_by_prompt_on_both_sides() -> None:
    splits, remarks = divide({1: talk(5), -1: talk(6)}, {}, seed=0)
    for side in (1, -1):
        parts = [splits[side].calibration, splits[side].tune, splits[side].report]
        assert sum(map(len, parts)) == 40
        assert not prompts(parts[0]) & (prompts(parts[1]) | prompts(parts[2]))
        assert not prompts(parts[1]) & prompts(parts[2])
        assert len(prompts(parts[0])) == 16
        assert remarks[side].leaks == 0
    assert prompts(splits[1].tune) == prompts(splits[-1].tune)


@pytest.mark.parametrize(("own", "contrast"), [(64, 60), (100, 60), (30, 26), (40, 41)])
def test_a_prompt_is_in_one_part_though_not_all_are_on_both_sides(own: int, contrast: int) -> None:
    sides = {1: talk(5, own, own), -1: talk(6, contrast, contrast)}
    for seed in range(5):
        splits, _ = divide(sides, {}, seed)
        parts = [
            {prompt for split in splits.values() for prompt in prompts(getattr(split, part))}
            for part in ("calibration", "tune", "report")
        ]
        assert not any(one & other for one, other in combinations(parts, 2))
        assert all(abs(len(split.tune) - len(split.report)) <= 2 for split in splits.values())


def test_what_one_side_validates_the_other_holds_out() -> None:
    """It could not be compared otherwise, and the mask would be found in it."""
    fresh = [Encoded((1, 10 + index), (9, index)) for index in range(10)]
    splits, _ = divide({1: talk(5), -1: talk(6, prompts=40)[20:]}, {-1: fresh}, seed=0)
    assert not prompts(splits[1].calibration) & prompts(fresh)
    for part in ("tune", "report"):
        assert prompts(getattr(splits[1], part)) == prompts(getattr(splits[-1], part))


def test_answers_to_a_single_prompt_do_one_job_each() -> None:
    held = {side: [Encoded((1, 99), (side % 7, index)) for index in range(9)] for side in (1, -1)}
    splits, _ = divide({1: talk(5), -1: talk(6)}, held, seed=0)
    for side, split in splits.items():
        assert [*split.tune, *split.report] == held[side]
        assert (len(split.tune), len(split.report)) == (5, 4)
    lone, _ = divide({1: talk(5)}, {1: held[1][:1]}, seed=0)
    assert lone[1].tune == lone[1].report == held[1][:1]


def test_pairs_come_first_in_whatever_order_the_sides_are() -> None:
    own = [Encoded((1, 200 + index), (5, index)) for index in range(30)]
    contrast = [Encoded((1, 200 + index), (6, index)) for index in range(40)]
    random.Random(0).shuffle(contrast)
    splits, _ = divide({1: talk(5), -1: talk(6)}, {1: own, -1: contrast}, seed=0)
    for part in ("tune", "report"):
        first, second = (getattr(splits[side], part) for side in (1, -1))
        assert 13 <= len(first) <= 17
        assert [one.prompt for one in first] == [one.prompt for one in second[: len(first)]]


def test_the_seed_and_nothing_else_decides() -> None:
    def held(seed: int, order: list[Encoded]) -> set[tuple[int, ...]]:
        return prompts(divide({1: order}, {}, seed)[0][1].tune)

    examples = talk(5)
    shuffled = random.Random(0).sample(examples, len(examples))
    assert held(0, examples) == held(0, shuffled)
    assert len({frozenset(held(seed, examples)) for seed in range(8)}) > 1


def test_leaks_are_left_out_and_counted_and_duplicates_counted() -> None:
    known = talk(5)
    fresh = [Encoded((1, 90 + index), (7, 8)) for index in range(6)]
    splits, remarks = divide({1: [*known, known[0]]}, {1: [*known[:3], *fresh, *fresh[:2] * 4]}, seed=0)
    assert len(splits[1].calibration) == 41
    assert sorted([*splits[1].tune, *splits[1].report], key=repr) == sorted(fresh, key=repr)
    assert (remarks[1].duplicates, remarks[1].leaks, remarks[1].repeats) == (1, 3, 8)


def test_validation_that_answers_prompts_of_the_calibration_is_counted() -> None:
    known = talk(5)
    fresh = [Encoded((1, 90 + index), (7, 8)) for index in range(6)]
    other = [Encoded(known[0].prompt, (99, index)) for index in range(3)]
    assert divide({1: known}, {1: [*fresh, *other]}, seed=0)[1][1].known_prompts == 3


def test_what_both_sides_say_is_counted() -> None:
    fresh = {1: [Encoded((1, 99), (7,))] * 2}
    _, remarks = divide({1: talk(5), -1: [*talk(5)[:10], *talk(6)[10:]]}, {1: fresh[1], -1: fresh[1]}, seed=0)
    assert (remarks[1].shared, remarks[-1].shared) == (10, 10)


@pytest.mark.parametrize(
    ("sides", "validation", "words"),
    [
        ({1: talk(5, count=3, prompts=3)}, {}, "3 examples leave 2 to find a persona in; give at least 4"),
        ({1: talk(5, count=9, prompts=1)}, {}, "all examples answer one prompt"),
        ({1: talk(5)}, {1: talk(5)[:7]}, "all 7 validation examples are calibration examples too"),
        ({1: talk(5), -1: talk(5)}, {}, "both sides say the same"),
        ({1: talk(5), -1: [*talk(5)[:31], *talk(6)[31:]]}, {}, "of 32 examples are word for word the same on both"),
    ],
)
def test_what_cannot_be_split_is_refused(
    sides: dict[int, list[Encoded]], validation: dict[int, list[Encoded]], words: str
) -> None:
    with pytest.raises(BadDataset, match=words):
        divide(sides, validation, seed=0)


def test_plain_text_is_split_by_text() -> None:
    texts = [Encoded((1,), (index, 2)) for index in range(20)]
    splits, _ = divide({1: texts}, {}, seed=0)
    parts = [set(splits[1].calibration), set(splits[1].tune), set(splits[1].report)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert len(set.union(*parts)) == 20


def test_the_nth_answers_to_a_prompt_meet_and_equal_ones_do_not_count() -> None:
    own = [Encoded((1, 2), (10,)), Encoded((1, 3), (11,)), Encoded((1, 2), (12,)), Encoded((1, 4), (13,))]
    contrast = [Encoded((1, 2), (20,)), Encoded((1, 2), (12,)), Encoded((1, 3), (21,)), Encoded((1, 9), (22,))]
    assert match(own, contrast) == [(0, 0), (1, 2)]
    assert match(contrast, own) == [(0, 0), (2, 1)]


@pytest.mark.parametrize(
    ("calibrates", "chooses", "sizes"),
    [(True, True, (4, 3, 3)), (False, True, (0, 5, 5)), (True, False, (5, 0, 5)), (False, False, (0, 0, 10))],
)
def test_neutral_text_takes_turns(calibrates: bool, chooses: bool, sizes: tuple[int, ...]) -> None:
    texts = [Encoded((1,), (index,)) for index in range(10)]
    split = divide_neutral(texts, calibrates, chooses)
    assert (len(split.calibration), len(split.tune), len(split.report)) == sizes
    assert len({*split.calibration, *split.tune, *split.report}) == 10
    with pytest.raises(BadDataset, match="neutral texts are too few"):
        divide_neutral(texts[: int(calibrates) + int(chooses)], calibrates, chooses)


def test_neutral_text_that_repeats_is_in_one_part() -> None:
    texts = [Encoded((1,), (index % 5,)) for index in range(30)]
    split = divide_neutral(texts, True, True)
    assert sorted(one.response for part in vars(split).values() for one in part) == [(index,) for index in range(5)]


def test_only_so_many_tokens_are_taken() -> None:
    texts = [Encoded((1,), (2,) * length) for length in (4, 9, 2, 1)]
    assert [count_within(texts, tokens) for tokens in (4, 5, 15, 18, 20, 99)] == [0, 1, 2, 3, 4, 4]


def say(index: int, text: str = "a") -> Example:
    return Example(({"role": "user", "content": f"q{index}"},), text)


def test_a_sample_keeps_prompts_in_common() -> None:
    own, other = ([say(index, text) for index in range(50)] for text in "ab")
    chosen = [sample(side, 10, seed=3) for side in (own, other)]
    assert [len(side) for side in chosen] == [10, 10]
    asked = [[example.messages[0]["content"] for example in side] for side in chosen]
    assert asked[0] == asked[1]
    assert asked[0] != [example.messages[0]["content"] for example in sample(own, 10, seed=4)]
    assert sample(own, 50, seed=3) == own == sample(own, None, seed=3)


def test_a_pool_takes_one_of_each_by_turns() -> None:
    assert mix([[say(1), say(2)], [say(3), say(4), say(5)]]) == [say(1), say(3), say(2), say(4)]


def test_a_contrast_of_another_form_is_refused() -> None:
    system = Example(({"role": "system", "content": "s"}, {"role": "user", "content": "q"}), "a")
    check_contrast([say(1), system], [replace(system, response="b")])
    with pytest.raises(BadDataset, match="prompts are chat and the contrast's chat with a system prompt"):
        check_contrast([say(1)], [system])


def test_a_contrast_that_says_the_same_is_refused_in_any_order() -> None:
    with pytest.raises(BadDataset, match="say the same"):
        check_contrast([say(1), say(2)], [say(2), say(1)])
    with pytest.raises(BadDataset, match="2 of 3 examples are word for word the same"):
        check_contrast([say(1), say(2), say(3)], [say(2), say(1), say(4), say(5)])
