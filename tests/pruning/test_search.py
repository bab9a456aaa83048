"""The search for a mask: its gradients are those of the masked model, and it goes where they point."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from maskstore import BaseRef, Mask, MaskInfo, Target
from masquerade.evaluate.dataset import Encoded, batches
from masquerade.evaluate.metrics import finish, likelihoods
from masquerade.evaluate.treatment import Treatment
from masquerade.kernels import dense_weight
from masquerade.model import AppliedMask, Base, MaskManager, find_targets
from masquerade.pruning.collector import CalibrationText, StatisticsCollector
from masquerade.pruning.responses import group
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.search import MaskSearch, Ranking, SearchSettings, exchange

SETTINGS = SearchSettings(
    rho=0.05,
    steps=6,
    judged_from=2,
    judged_every=2,
    saved_every=1,
    pairs_a_batch=2,
    batches_a_step=2,
    neutral_a_batch=2,
    neutral_batches_a_step=1,
)


def make_examples(seed: int, count: int = 6, longest: int = 12) -> list[Encoded]:
    rng = random.Random(seed)
    words = lambda most: tuple(rng.randrange(3, 90) for _ in range(rng.randrange(1, most)))  # noqa: E731
    return [Encoded((1, *words(longest)), (*words(longest), 2)) for _ in range(count)]


def make_pairs(count: int = 6) -> list[tuple[Encoded, Encoded]]:
    own, other = make_examples(1, count), make_examples(2, count)
    return [(one, Encoded(one.prompt, two.response)) for one, two in zip(own, other, strict=True)]


PAIRS, NEUTRAL = make_pairs(), make_examples(3, 4)


def prepare(base: Base, scratch: Scratch | None = None, sides: tuple[int, ...] = (1, -1), **more: Any) -> MaskSearch:
    """A search after its statistics."""
    targets, scratch = find_targets(base.model), scratch or Scratch()
    search = MaskSearch(base, targets, sides, replace(SETTINGS, **more), scratch)
    needs: Any = frozenset({"gradient", "squared_gradient"})
    examples = {"own": [one for one, _ in PAIRS], "contrast": [two for _, two in PAIRS], "neutral": NEUTRAL}
    texts: Any = {role: CalibrationText(list(batches(of, base.device)), needs) for role, of in examples.items()}
    collector = StatisticsCollector(base, targets, texts, scratch)

    def skip(_: int, statistics: Mapping[str, Any]) -> Iterator[int]:
        yield len(statistics)

    def add(_: int, statistics: Mapping[str, Any]) -> Iterator[int]:
        yield from search.add_layer({name: targets[name] for name in statistics}, statistics)

    assert sum(collector.forward(skip)) == collector.forward_items
    assert sum(collector.backward(add)) == collector.backward_items
    finish(search.prepare(PAIRS, NEUTRAL))
    return search


def draft(base: Base, targets: Mapping[str, Target]) -> Mask:
    return Mask(BaseRef(base.fingerprint, base.name), targets, MaskInfo(persona="draft", score="draft"))


def judge(_: Mapping[str, Target]) -> Generator[None, None, float]:
    """Every state is as good as the one before: the first is kept."""
    yield
    return 0.0


def test_the_base_likelihoods_are_those_of_the_whole_text(tiny: Base, manager: MaskManager) -> None:
    """Stored prompts, padding and cut responses change nothing."""
    search = prepare(tiny)
    found = sorted(float(value) for batch in search._likelihoods for value in batch)
    expected = sorted(-one.mean for one in likelihoods(tiny, [one for pair in PAIRS for one in pair]))
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", [1, -1])
def test_a_step_adds_the_gradient_of_the_loss_at_the_masked_model(tiny: Base, manager: MaskManager, side: int) -> None:
    """The oracle: one example at a time through the stock model, its prompt's cache from the base's weights."""
    search = prepare(tiny, batches_a_step=3, neutral_batches_a_step=2)  # a step reads everything
    state = finish(search._start(side))
    before = {name: gains.clone() for name, gains in state.gains.items()}
    list(search._accumulate(side, state))
    expected = _differentiate(tiny, state.pruned, side)
    for name, gains in state.gains.items():
        torch.testing.assert_close(gains - before[name], expected[name], rtol=2e-3, atol=2e-6)


def _scale(weight: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    masked = weight.detach().clone()
    masked.flatten()[pruned] *= SETTINGS.gamma  # a view
    return masked


def _differentiate(base: Base, pruned: Mapping[str, torch.Tensor], side: int) -> dict[str, Any]:
    """Each weight's product with the gradient of a step's loss."""
    weights = {name: dense_weight(linear) for name, linear in find_targets(base.model).items()}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def predict(one: Encoded, masked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the response under the weights `masked`, after a prompt under the base's."""
        cache, prompt = DynamicCache(config=base.model.config), torch.tensor([one.prompt[:-1]], dtype=torch.long)
        if prompt.numel():
            with torch.no_grad():
                base.model(input_ids=prompt, past_key_values=cache, use_cache=True)
        arguments = {"input_ids": torch.tensor([(one.prompt[-1], *one.response[:-1])]), "past_key_values": cache}
        swapped = {f"{name}.weight": weight for name, weight in masked.items()}
        return torch.func.functional_call(base.model, swapped, kwargs=arguments | {"use_cache": True}).logits[0].float()

    def read(one: Encoded, masked: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(predict(one, masked), torch.tensor(one.response))

    def accumulate(loss: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], scale: float) -> None:
        masked = {name: _scale(weight, pruned[name]).requires_grad_(True) for name, weight in weights.items()}
        for name, gradient in zip(masked, torch.autograd.grad(loss(masked), list(masked.values())), strict=True):
            found[name] += scale * gradient * weights[name]

    for own, contrast in (pair[::side] for pair in PAIRS):
        before = float(read(contrast, weights) - read(own, weights))

        def compare(masked: Any, own: Encoded = own, contrast: Encoded = contrast, before: float = before) -> Any:
            mine, theirs = read(own, masked), read(contrast, masked)
            return SETTINGS.likelihood * mine + F.softplus(-SETTINGS.sharpness * (theirs - mine - before))

        weight = min(len(own.response), len(contrast.response)) / SETTINGS.tokens
        accumulate(compare, weight / len(PAIRS))
    for members in group([(one,) for one in NEUTRAL], SETTINGS.neutral_a_batch, SETTINGS.tokens):
        positions = sum(len(NEUTRAL[index].response) for index in members)
        for one in (NEUTRAL[index] for index in members):
            plain = predict(one, weights).log_softmax(-1)

            def diverge(masked: Any, one: Encoded = one, plain: torch.Tensor = plain) -> Any:
                return (plain.exp() * (plain - predict(one, masked).log_softmax(-1))).sum()

            accumulate(diverge, SETTINGS.pressure / 2 / positions)
    return found


def test_a_search_shifts_the_margin_and_leaves_the_base_alone(tiny: Base, manager: MaskManager) -> None:
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    targets = finish(prepare(tiny).run(1, judge))
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    shifts = _shifts(tiny, manager, targets)
    assert sum(shifts) / len(shifts) > 0.02
    assert sum(shift > 0 for shift in shifts) > len(shifts) / 2


def _shifts(base: Base, manager: MaskManager, targets: Mapping[str, Target]) -> list[float]:
    treatment = Treatment(applied=AppliedMask(manager.fit(draft(base, targets)), SETTINGS.gamma), phase="decode")
    plain, masked = (
        [likelihoods(base, [pair[side] for pair in PAIRS], how) for side in (0, 1)] for how in (Treatment(), treatment)
    )
    margins = [[mine.mean - theirs.mean for mine, theirs in zip(*texts, strict=True)] for texts in (plain, masked)]
    return [after - before for before, after in zip(*margins, strict=True)]


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_an_interrupted_search_goes_on_from_its_last_step(
    tiny: Base, manager: MaskManager, tmp_path: Path, share: float
) -> None:
    whole = prepare(tiny, Scratch(tmp_path / "whole"))
    expected = finish(whole.run(1, judge))
    broken = prepare(tiny, Scratch(tmp_path / "broken"))
    work = broken.run(1, judge)
    for _ in range(int(share * broken.items)):
        next(work)
    del work, broken  # killed
    found = finish(prepare(tiny, Scratch(tmp_path / "broken")).run(1, judge))
    assert draft(tiny, found).digest == draft(tiny, expected).digest


def test_the_state_that_the_judge_likes_best_is_kept(tiny: Base, manager: MaskManager) -> None:
    seen: list[dict[str, Target]] = []

    def judge_second(targets: Mapping[str, Target]) -> Generator[None, None, float]:
        seen.append(dict(targets))
        yield
        return -abs(len(seen) - 2.0)

    found = finish(prepare(tiny, patience=5).run(1, judge_second))
    assert len(seen) == 3
    assert draft(tiny, found).digest == draft(tiny, seen[1]).digest


def test_what_is_beyond_the_cap_leaves_when_the_mask_shrinks() -> None:
    """Good as they are, no Linear has more than its share."""
    values = torch.arange(200.0).flip(0) + 1
    ranking = Ranking(values[:50], torch.arange(50), values[:100])
    assert exchange(torch.arange(100), ranking, torch.tensor(1.0), 0.2).tolist() == list(range(50))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_one_step_exchanges_a_share_of_the_pruned_weights(data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    values = torch.randn(12, 17, generator=rng)
    pruned = torch.rand(12, 17, generator=rng) < data.draw(st.sampled_from([0.0, 0.05, 0.2]))
    count, share = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0.1, 0.5, 1.0]))
    best = values.flatten().topk(data.draw(st.integers(count, 80)))
    threshold = best.values[count - 1]
    places = exchange(
        pruned.flatten().nonzero().squeeze(1), Ranking(best.values, best.indices, values[pruned]), threshold, share
    )
    assert bool((places.diff() > 0).all())
    found = torch.zeros_like(pruned).flatten().index_fill(0, places, True).view_as(pruned)
    left, entered = pruned & ~found, found & ~pruned
    before, most = int(pruned.sum()), max(1, round(share * max(count, int(pruned.sum()))))
    assert bool((values[entered] >= threshold).all())
    assert bool((values[left] < threshold).all())
    assert int(left.sum()) <= most + max(0, before - count)
    assert int(entered.sum()) <= most + max(0, count - before)
    if share == 1 or not before:
        assert torch.equal(found, values >= threshold)
    for moved, stayed in ((-values[left], -values[pruned & found]), (values[entered], values[~pruned & ~found])):
        assert not len(moved) or not len(stayed) or moved.min() >= stayed.max()


def test_the_weights_of_most_worth_in_all_linears_are_pruned(tiny: Base, manager: MaskManager) -> None:
    """Some Linears get more than others, within the bound."""
    search = prepare(tiny, initial_share=0.5, concentration=3.0)
    state = finish(search._start(1))
    sizes = {name: gains.numel() for name, gains in state.gains.items()}
    counts = {name: len(pruned) for name, pruned in state.pruned.items()}
    assert sum(counts.values()) == pytest.approx(0.5 * SETTINGS.rho * sum(sizes.values()), abs=1)
    shares = [counts[name] / size for name, size in sizes.items()]
    assert min(shares) < 0.5 * SETTINGS.rho < max(shares) <= 1.5 * SETTINGS.rho + 1 / min(sizes.values())


@given(st.integers(0, 999), st.integers(1, 5), st.integers(20, 100))
@settings(max_examples=60, deadline=None)
def test_groups_hold_every_example_once_within_the_bound(seed: int, size: int, most: int) -> None:
    examples = [(one,) for one in make_examples(seed, 9)]
    groups = group(examples, size, 6, most)
    assert sorted(index for members in groups for index in members) == list(range(9))
    for members in groups:
        assert len(members) <= size
        for length in (
            max(len(examples[index][0].prompt) for index in members),
            max(len(examples[index][0].response[:6]) for index in members),
        ):
            assert len(members) == 1 or len(members) * length <= most
