"""Every score against its equation, transcribed in float64; ties, groups and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from masquerade.errors import BuildFailed
from masquerade.pruning.candidates import CandidateMasks, ScorePlan
from masquerade.pruning.moments import Moments
from masquerade.pruning.scores import EPSILON, SCORES, ScoreSettings
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.selection import prune, prune_lowest, rank
from masquerade.pruning.statistics import ChannelStatistics, LinearStatistics, TextStatistics

Array = NDArray[np.float64]
OUT, IN, EXAMPLES, LENGTH = 12, 20, 6, 5
SIDES = ("own", "contrast", "neutral")


class Example:
    """Random inputs, gradients and squared gradients of three texts as arrays, and the statistics of them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weight = rng.normal(size=(OUT, IN))
        scale = {side: np.exp(rng.normal(size=IN)) for side in SIDES}
        self.inputs = {side: rng.normal(size=(EXAMPLES, LENGTH, IN)) * scale[side] for side in SIDES}
        self.gradients = {side: rng.normal(size=(OUT, IN)) for side in SIDES}
        self.squared_gradients = {side: rng.random(size=(OUT, IN)) for side in SIDES}

    def statistics(self) -> LinearStatistics:
        return LinearStatistics(*(self._see(side) for side in SIDES))

    def _see(self, side: str) -> TextStatistics:
        x = torch.from_numpy(self.inputs[side])
        rows = x.flatten(0, 1)
        channels = ChannelStatistics(Moments.of(rows.abs()), Moments.of(x.square().mean(1).sqrt()))
        gradient, squared_gradient = (
            torch.from_numpy(self.gradients[side]),
            torch.from_numpy(self.squared_gradients[side]),
        )
        return TextStatistics(channels, rows.T @ rows / len(rows), gradient, squared_gradient)

    def z(self, column: int) -> float:
        levels = [np.sqrt((self.inputs[side][:, :, column] ** 2).mean(1)) for side in ("own", "contrast")]
        return float((levels[0].mean() - levels[1].mean()) / (np.sqrt(levels[0].var() + levels[1].var()) + EPSILON))


def magnitude(e: Example, i: int, j: int) -> float:
    return abs(e.weight[i, j])


def wanda(e: Example, i: int, j: int) -> float:
    return abs(e.weight[i, j]) * np.sqrt((e.inputs["own"][:, :, j] ** 2).mean())


def contrastive_wanda(e: Example, i: int, j: int) -> float:
    return abs(e.weight[i, j]) * max(0.0, e.z(j))


def contrastive_sparse(e: Example, i: int, j: int) -> float:
    def share(side: str) -> float:
        level = np.abs(e.inputs[side]).mean((0, 1))
        return abs(e.weight[i, j]) * level[j] / sum(abs(e.weight[i, k]) * level[k] for k in range(IN))

    return share("own") - share("contrast")


def signed(e: Example, i: int, j: int) -> float:
    return abs(e.weight[i, j]) * e.z(j)


def attribution(e: Example, i: int, j: int) -> float:
    return e.weight[i, j] * (e.gradients["own"][i, j] - e.gradients["contrast"][i, j])


def attribution_fisher(e: Example, i: int, j: int) -> float:
    cost = e.weight**2 * (e.squared_gradients["own"] + e.squared_gradients["neutral"]) / 4
    return attribution(e, i, j) / (cost[i, j] + cost.mean())


def sparsegpt(e: Example, i: int, j: int, rho: float = 0.5, block: int = 8, damping: float = 0.01) -> float:
    """One weight at a time, with an explicit inverse Hessian from which visited columns are eliminated."""
    rows = e.inputs["own"].reshape(-1, IN)
    hessian = rows.T @ rows / len(rows)
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(IN)
    inverse, copy = np.linalg.inv(hessian), e.weight.copy()
    scores, gone = np.empty_like(copy), np.zeros_like(copy, dtype=bool)
    for column in range(IN):
        if column % block == 0:
            stop = min(column + block, IN)
            ahead = inverse.copy()
            for k in range(column, stop):
                scores[:, k] = copy[:, k] ** 2 / ahead[k, k]
                ahead = ahead - np.outer(ahead[:, k], ahead[k]) / ahead[k, k]
            flat = scores[:, column:stop].ravel()
            chosen = np.argsort(flat, kind="stable")[: round(rho * flat.size)]
            mask = np.zeros(flat.size, dtype=bool)
            mask[chosen] = True
            gone[:, column:stop] = mask.reshape(OUT, -1)
        for row in np.flatnonzero(gone[:, column]):
            copy[row] -= copy[row, column] / inverse[column, column] * inverse[column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return float(scores[i, j])


ORACLES: dict[str, Callable[[Example, int, int], float]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "contrastive-wanda": contrastive_wanda,
    "contrastive-sparse": contrastive_sparse,
    "signed": signed,
    "attribution": attribution,
    "attribution-fisher": attribution_fisher,
    "sparsegpt": sparsegpt,
}


def compute(name: str, example: Example, **choices: object) -> torch.Tensor:
    return SCORES[name].function(torch.from_numpy(example.weight), example.statistics(), ScoreSettings(**choices))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(ORACLES))
def test_a_score_is_its_equation(name: str) -> None:
    assert ORACLES.keys() == SCORES.keys() - {"refined"}  # which is searched for from attribution-fisher
    example = Example()
    found = compute(name, example, block=8)
    places = [(0, 0), (3, 7), (3, 8), (11, 19), (5, 13)]
    expected = [ORACLES[name](example, *place) for place in places]
    assert [float(found[place]) for place in places] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_softplus_is_the_other_phi() -> None:
    example = Example()
    found = compute("contrastive-wanda", example, phi="softplus")
    assert float(found[2, 3]) == pytest.approx(abs(example.weight[2, 3]) * np.log1p(np.exp(example.z(3))), rel=1e-5)


@pytest.mark.parametrize("name", ["signed", "attribution", "contrastive-sparse"])
def test_opposites_have_opposite_scores(name: str) -> None:
    example = Example()
    own, other = example.statistics(), example.statistics().swapped()
    weight = torch.from_numpy(example.weight)
    function = SCORES[name].function
    assert torch.equal(function(weight, own, ScoreSettings()), -function(weight, other, ScoreSettings()))


def test_eq_9_prunes_disjoint_sets() -> None:
    """No weight is taken from both personas, as long as rho does not exceed what belongs to either in a row."""
    example = Example()
    weight = torch.from_numpy(example.weight)
    sides = [example.statistics(), example.statistics().swapped()]
    masks = [
        prune_lowest(SCORES["contrastive-sparse"].function(weight, side, ScoreSettings()), 0.3, "row") for side in sides
    ]
    assert not (masks[0] & masks[1]).any()


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("rho", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("silent", [0.0, 0.5, 0.8, 1.0])
def test_eq_9_prunes_a_weight_from_one_side_at_most(group: str, rho: float, silent: float) -> None:
    """Also where all scores are equal, because channels are silent on both sides."""
    example = Example()
    mute = np.random.default_rng(1).permutation(IN) < silent * IN
    for side in SIDES:
        example.inputs[side][:, :, mute] = 0
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.from_numpy(example.weight).float()
    candidates = CandidateMasks(
        ScorePlan("contrastive-sparse", group, "all", (0.1, 0.3, 0.5)), (1, -1), ScoreSettings(), Scratch()
    )
    name = "model.layers.0.self_attn.o_proj"
    for _ in candidates.score_layer("forward-0", False, {name: linear}, {name: example.statistics()}):
        pass
    candidates.load("forward-0")
    own, other = (~candidates.targets(("contrastive-sparse", side, rho))[name].to_keep() for side in (1, -1))
    assert own.sum() == other.sum() == (OUT * round(rho * IN) if group == "row" else round(rho * OUT * IN))
    assert not (own & other).any()


@pytest.mark.parametrize("group", ["row", "layer"])
def test_backwards_ties_go_from_the_last_on(group: str) -> None:
    score = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    tie = torch.tensor([[0.0, 2.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    places = rank(score, 0.5, group, backwards=True)
    assert places.tolist() == ([[3, 2], [3, 1]] if group == "row" else [[7, 5, 4, 3]])
    assert rank(score, 0.5, group, tie, backwards=True).tolist() == (
        [[3, 2], [0, 3]] if group == "row" else [[4, 7, 5, 3]]
    )


def test_eq_8_breaks_its_ties_by_wanda() -> None:
    """Relu leaves many scores at exactly 0: of those the least important go, whatever their index."""
    example = Example()
    weight, statistics = torch.from_numpy(example.weight), example.statistics()
    score = SCORES["contrastive-wanda"]
    values, importance = (f(weight, statistics, ScoreSettings()) for f in (score.function, SCORES["wanda"].function))
    assert score.tie is not None
    pruned = prune_lowest(values, 0.2, "row", score.tie(weight, statistics, ScoreSettings()))
    for row in range(OUT):
        zeros = values[row] == 0
        assert int(zeros.sum()) > int(pruned[row].sum())
        assert (zeros | ~pruned[row]).all()
        assert importance[row][pruned[row]].max() <= importance[row][zeros & ~pruned[row]].min()


@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_reconstructs_better_than_magnitude_on_correlated_inputs(seed: int) -> None:
    """Correlated channels of different sizes, as a model's are; pruned as served, without fitting the others again."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(64) + rng.normal(size=(64, 64)) / 8
    inputs = rng.normal(size=(400, 64)) @ mixing * np.exp(rng.normal(size=64))
    weight, x = torch.from_numpy(rng.normal(size=(32, 64))), torch.from_numpy(inputs)
    statistics = LinearStatistics(TextStatistics(hessian=x.T @ x / len(x)))
    loss = {}
    for name in ("sparsegpt", "magnitude"):
        pruned = prune_lowest(SCORES[name].function(weight, statistics, ScoreSettings(rho=0.5, block=16)), 0.5, "layer")
        loss[name] = float((x @ (weight * pruned).T).square().sum())
    assert loss["sparsegpt"] < 0.5 * loss["magnitude"]


def test_sparsegpt_bears_dead_channels_and_says_when_it_cannot_go_on() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    found = SCORES["sparsegpt"].function(
        torch.ones(2, 3), LinearStatistics(TextStatistics(hessian=hessian)), ScoreSettings()
    )
    assert found[:, 1].tolist() == [0, 0]
    assert found.isfinite().all()
    with pytest.raises(BuildFailed, match="3 channels is not positive definite"):
        SCORES["sparsegpt"].function(
            torch.ones(2, 3), LinearStatistics(TextStatistics(hessian=-torch.eye(3))), ScoreSettings()
        )


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 1.0])
def test_the_lowest_scores_of_a_group_are_pruned(group: str, rho: float) -> None:
    score = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    pruned = prune_lowest(score, rho, group)
    groups = zip(score, pruned, strict=True) if group == "row" else [(score.flatten(), pruned.flatten())]
    for scores, gone in groups:
        assert int(gone.sum()) == round(rho * len(scores))
        assert not gone.any() or gone.all() or scores[gone].max() <= scores[~gone].min()


@pytest.mark.parametrize("group", ["row", "layer"])
def test_ties_go_in_order_of_their_index(group: str) -> None:
    pruned = prune_lowest(torch.zeros(4, 10), 0.25, group)
    expected = torch.zeros(4, 10, dtype=torch.bool)
    if group == "row":
        expected[:, :2] = True
    else:
        expected.view(-1)[:10] = True
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_smaller_rho_is_the_beginning_of_a_larger_one(group: str, tied: bool) -> None:
    score = torch.randint(0, 4, (6, 30), generator=torch.Generator().manual_seed(0)).float()
    tie = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)) if tied else None
    longest = rank(score, 0.6, group, tie)
    for rho in (0.0, 0.1, 0.35, 0.6):
        assert torch.equal(prune(longest, score.shape, rho), prune_lowest(score, rho, group, tie))
