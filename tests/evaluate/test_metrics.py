"""Likelihoods against one example at a time; shares against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import Likelihood, finish, flips, likelihoods, margins, perplexity
from masquerade.evaluate.repetition import share_looping
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

EXAMPLES = [Encoded((1, *range(20, 20 + index)), (*range(60, 63 + index % 4), 2)) for index in (0, 7, 3, 12, 3, 1)]


@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_likelihoods_equal_materialised_weights(tiny: Base, manager: MaskManager, gamma: float) -> None:
    mask = world.make_mask(tiny, 0.2, seed=3)
    found = likelihoods(tiny, EXAMPLES, Treatment(applied=AppliedMask(manager.fit(mask), gamma)))
    materialised = world.materialise(tiny.model, mask, gamma).double()
    for example, one in zip(EXAMPLES, found, strict=True):
        ids = torch.tensor([example.prompt + example.response])
        logs = materialised(ids).logits[0].log_softmax(-1)
        places = range(len(example.prompt), len(example))
        expected = sum(float(logs[place - 1, ids[0, place]]) for place in places)
        assert one.tokens == len(example.response)
        assert one.log == pytest.approx(expected, rel=1e-4)


def test_perplexity_weighs_tokens_not_examples() -> None:
    assert perplexity([Likelihood(-6.0, 3), Likelihood(-1.0, 1)]) == pytest.approx(math.exp(7 / 4))


def test_flips_count_prompts_that_follow_both_masks() -> None:
    assert flips([0.5, 0.5, -0.1, 0.2], [-0.2, 0.1, -0.3, -0.1]) == 0.5


def test_margins_compare_answers_of_different_lengths() -> None:
    assert margins([Likelihood(-4.0, 4)], [Likelihood(-6.0, 3)]) == [1.0]


def test_answers_to_prompts_of_the_sides_and_to_neutral_ones_may_loop(tiny: Base, manager: MaskManager) -> None:
    own, neutral = [Encoded((1, index), (5,)) for index in range(3, 8)], [Encoded((1, 9, 9), (5,)), Encoded((7,), (5,))]
    asked = [one for one in own[:4] + neutral if len(one.prompt) > 1]
    answers = finish(write_answers(tiny, [replace(one, response=()) for one in asked], UNTREATED, GenerationParams(24)))
    found = EvaluationSet(tiny, own, [], neutral)
    assert finish(found.measure_looping(UNTREATED, 4, 24)) == share_looping(answers)
    assert finish(EvaluationSet(tiny, own[:4], [], []).measure_looping(UNTREATED, 9, 24)) == share_looping(answers[:4])
    assert finish(EvaluationSet(tiny, [], [], []).measure_looping(UNTREATED, 4, 24)) == 0
