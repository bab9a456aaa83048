"""What prompts begin with is computed once, and rows leave a batch when they end: no figure and no answer changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masquerade.evaluate import metrics, paged, scorer, stored_prompts
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.generation import GenerationParams, _draw, write_answers
from masquerade.evaluate.metrics import divergence, finish, likelihoods, read_divergence, read_likelihoods
from masquerade.evaluate.prefix import WORTH, count_shared
from masquerade.evaluate.stored_prompts import StoredPrompts
from masquerade.evaluate.treatment import UNTREATED, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

SYSTEM = (1, *range(40, 60))


def make_texts(count: int = 9) -> list[Encoded]:
    rng = random.Random(0)
    words = lambda: tuple(rng.randrange(3, 90) for _ in range(rng.randrange(1, 12)))  # noqa: E731
    return [Encoded((*SYSTEM, *words()), (*words(), 2)) for _ in range(count)]


@pytest.fixture(params=[None, "all", "decode"])
def treatment(request: pytest.FixtureRequest, tiny: Base, manager: MaskManager) -> Treatment:
    phase: Phase | None = request.param
    if phase is None:
        return UNTREATED
    mask = manager.fit(world.make_mask(tiny, 0.05, seed=1))
    return Treatment(applied=AppliedMask(mask, 0.3), phase=phase)


@pytest.fixture(params=[True, False], ids=["native layers", "transformers"])
def native(request: pytest.FixtureRequest, manager: MaskManager, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the native layers predict."""
    if not request.param:
        for module in (metrics, stored_prompts):
            monkeypatch.setattr(module, "find_native_stack", lambda *_: None)
    return bool(request.param)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=100).map(tuple), min_size=1, max_size=5))
def test_what_is_shared_begins_all_prompts_and_is_all_of_none(prompts: list[tuple[int, ...]]) -> None:
    for given_prompts in (prompts, [(0,) * 64 + prompt for prompt in prompts]):
        shared = count_shared(given_prompts)
        assert len({prompt[:shared] for prompt in given_prompts}) == 1
        assert all(shared < len(prompt) for prompt in given_prompts)
        assert not shared or shared * (len(prompts) - 1) >= WORTH
    assert len(prompts) == 1 or shared >= 64


def test_likelihoods_are_those_of_each_text_alone(tiny: Base, treatment: Treatment, native: bool) -> None:
    """To the bit, by the native layers."""
    texts = make_texts()
    assert count_shared([text.prompt for text in texts]) >= len(SYSTEM)
    together, alone = likelihoods(tiny, texts, treatment), [likelihoods(tiny, [one], treatment)[0] for one in texts]
    assert [one.log for one in together] == pytest.approx([one.log for one in alone], abs=0 if native else 1e-3)
    if treatment is not UNTREATED:
        parts = [divergence(tiny, [one], treatment) * len(one.response) for one in texts]
        expected = sum(parts) / sum(len(one.response) for one in texts)
        assert divergence(tiny, texts, treatment) == pytest.approx(expected, rel=1e-3)


def test_answers_are_those_of_each_prompt_alone(tiny: Base, treatment: Treatment) -> None:
    """Some end at once, some go on to the limit."""
    prompts, params = make_texts(24), GenerationParams(30)
    together = finish(write_answers(tiny, prompts, treatment, params))
    assert together == [finish(write_answers(tiny, [one], treatment, params))[0] for one in prompts]
    assert len({len(text) for text in together}) > 3


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found = _draw(probabilities.expand(len(draws), -1), draws)
    shares = torch.bincount(found, minlength=len(probabilities)) / len(draws)
    assert ((shares - probabilities).abs() < 0.015).all()
    least_and_most = _draw(probabilities.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert least_and_most.tolist() == [1, 4]  # never one without probability


def test_the_native_layers_predict_what_transformers_does(
    tiny: Base, treatment: Treatment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in many passes, of long prompts, of responses that span blocks, and of several to one prompt."""
    rng = random.Random(1)
    lengths = [(1, 5), (1, 9), (64, 70), (65, 64), (130, 100), (66, 1), (2, 90)]
    draw = lambda count: tuple(rng.randrange(3, 90) for _ in range(count))  # noqa: E731
    texts = [Encoded(draw(prompt), draw(response)) for prompt, response in lengths]
    texts += [Encoded(texts[2].prompt, draw(20)), *make_texts(4)]
    found, found_divergence = likelihoods(tiny, texts, treatment), divergence(tiny, texts, treatment)
    for module in (paged, scorer):
        monkeypatch.setattr(module, "PASS_TOKENS", 16)
    assert likelihoods(tiny, texts, treatment) == found
    monkeypatch.setattr(metrics, "find_native_stack", lambda *_: None)
    expected = likelihoods(tiny, texts, treatment)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.log for one in found] == pytest.approx([one.log for one in expected], rel=1e-4)
    assert found_divergence == pytest.approx(divergence(tiny, texts, treatment), rel=1e-3, abs=1e-9)


@pytest.mark.usefixtures("manager")
def test_plain_texts_are_packed_although_all_begin_with_the_same_token(tiny: Base) -> None:
    texts = [Encoded((1,), (5, 6, 7, 2)), Encoded((1,), (8, 2)), Encoded((1,), (9, 9, 2))]
    (part,) = metrics.predict(tiny, texts, UNTREATED)
    assert sorted(part.index) == [0, 1, 2]
    assert likelihoods(tiny, texts) == [likelihoods(tiny, [one])[0] for one in texts]


@pytest.mark.usefixtures("manager")
def test_a_longer_response_than_is_expected_is_predicted_all_the_same(tiny: Base) -> None:
    stored, texts = StoredPrompts(tiny), make_texts()
    finish(stored.store(texts))
    assert stored.find_scorers(texts)
    longer = [replace(texts[0], response=(*texts[0].response, 5, 6, 7, 8, 9, 10, 11, 12, 13, 2)), *texts[1:]]
    assert not stored.find_scorers(longer)
    assert finish(read_likelihoods(tiny, longer, UNTREATED, stored)) == likelihoods(tiny, longer)


def test_a_hook_that_nobody_knows_of_leaves_all_to_transformers(tiny: Base, manager: MaskManager) -> None:
    mask = AppliedMask(manager.fit(world.make_mask(tiny, 0.05, seed=1)), 0.3)
    treatment, texts = Treatment(applied=mask, phase="decode"), make_texts()
    expected, apart = likelihoods(tiny, texts, treatment), divergence(tiny, texts, treatment)
    stored, seen = StoredPrompts(tiny), list[int]()
    with tiny.model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1)):
        finish(stored.store(texts))
        found = finish(read_likelihoods(tiny, texts, treatment, stored))
        assert [one.log for one in found] == pytest.approx([one.log for one in expected], abs=1e-3)
        assert finish(read_divergence(tiny, texts, treatment, stored)) == pytest.approx(apart, rel=1e-3)
    assert seen
    assert stored.hold(texts)


def test_stored_prompts_change_no_likelihood(tiny: Base, treatment: Treatment, native: bool) -> None:
    """Also of two answers to one prompt, and of prompts that are as short as what all begin with."""
    texts = [*make_texts(), Encoded((*SYSTEM, 61), (5, 6, 2)), Encoded((*SYSTEM, 61), (7, 2))]
    stored = StoredPrompts(tiny)
    assert not stored.hold(texts)
    assert not stored.find_scorers(texts)
    finish(stored.store(texts))
    assert bool(stored.find_scorers(texts)) == native
    assert stored.hold(texts) != native
    for some in (texts, texts[:1], texts[3:5]):
        found, expected = finish(read_likelihoods(tiny, some, treatment, stored)), likelihoods(tiny, some, treatment)
        assert [one.log for one in found] == pytest.approx([one.log for one in expected], abs=1e-3)
        if treatment is not UNTREATED:
            assert finish(read_divergence(tiny, some, treatment, stored)) == pytest.approx(
                divergence(tiny, some, treatment), rel=1e-3
            )


@pytest.mark.usefixtures("native")
def test_prompts_are_computed_once(tiny: Base, manager: MaskManager) -> None:
    """A mask that applies to answers alone finds the prompts that the base has read; one of phase `all` does not."""
    mask = AppliedMask(manager.fit(world.make_mask(tiny, 0.05, seed=1)), 0.3)
    texts = make_texts()
    stored = StoredPrompts(tiny)
    finish(stored.store(texts))
    seen: list[int] = []
    with tiny.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel())):
        finish(stored.store(texts))
        assert not seen
        for phase, least in (("decode", 0), ("all", sum(len(one.prompt) - len(SYSTEM) for one in texts))):
            seen.clear()
            finish(read_likelihoods(tiny, texts, Treatment(applied=mask, phase=phase), stored))
            answers = sum(len(one.response) for one in texts)
            assert sum(seen) >= answers + least
            assert (sum(seen) < answers + sum(len(one.prompt) for one in texts)) or phase == "all"


@pytest.mark.usefixtures("native")
def test_what_cannot_be_stored_is_measured_all_the_same(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text has no prompt to store, and too many prompts are not stored at all."""
    plain = [Encoded((1,), (5, 6, 7, 2)), Encoded((1,), (8, 2))]
    stored = StoredPrompts(tiny)
    finish(stored.store(plain))
    assert not stored.hold(plain)
    assert not stored.find_scorers(plain)
    assert finish(read_likelihoods(tiny, plain, UNTREATED, stored)) == likelihoods(tiny, plain)
    monkeypatch.setattr(stored_prompts, "MOST_BYTES", 1)
    finish(stored.store(make_texts()))
    assert not stored.hold(make_texts()[:1])
    assert not stored.find_scorers(make_texts()[:1])
    assert finish(read_likelihoods(tiny, make_texts(), UNTREATED, stored)) == likelihoods(tiny, make_texts())
