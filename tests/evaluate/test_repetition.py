"""Loops and distinct n-grams, on answers that were written by hand."""

from __future__ import annotations

import pytest

from masquerade.evaluate.repetition import loops, measure_distinct

LOOPING = [
    "I love planning my weekends! I love planning my weekends! I love planning my weekends! I love plan",
    "It is very very very very very very very very very very",
    "First, go to the end of the old road and wait. Then go to the end of the old road and wait. "
    "Last, go to the end of the old road and wait. Done.",
    "No. No. No. No. No. No.",
]
PLAIN = [
    "",
    "Yes.",
    "Boil the egg for six minutes, cool it in cold water, and peel it.",
    "no no no",
    "1. Rest. 2. Drink water. 3. Sleep. 4. Call a doctor if the fever stays.",
    "I love it! I love it! And then we went home, and nobody spoke of it again.",
]


@pytest.mark.parametrize("text", LOOPING)
def test_an_answer_that_repeats_itself_loops(text: str) -> None:
    assert loops(text)
    assert loops(text.upper())


@pytest.mark.parametrize("text", PLAIN)
def test_an_answer_that_only_has_some_words_twice_does_not(text: str) -> None:
    assert not loops(text)


def test_distinct_counts_ngrams_of_all_texts() -> None:
    assert measure_distinct(["a b c", "A b d"], 2) == 3 / 4
    assert measure_distinct(["a b c", "a b d"], 3) == 1.0
    assert measure_distinct(["a", ""], 2) is None
    assert measure_distinct(["la la la la la"], 2) == 1 / 4
