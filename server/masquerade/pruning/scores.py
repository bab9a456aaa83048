"""Scores of weights; the lowest are pruned.

Every function maps weight [out, in], fp32, and its statistics to scores [out, in]. In the equations "+" is the persona
and "-" its opposite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masquerade.errors import BuildFailed
from masquerade.pruning.statistics import LinearStatistics, Statistic, channels_of, required

EPSILON = 1e-6  # avoids a division by zero in channels that are always zero

PHIS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "softplus": F.softplus}


@dataclass(frozen=True)
class ScoreSettings:
    """Parameters of the scores that have some."""

    phi: str = "relu"  # of `PHIS`; contrastive-wanda
    rho: float = 0.5  # share that sparsegpt assumes pruned when it propagates errors
    block: int = 128  # columns of a block of sparsegpt
    damping: float = 0.01  # added to the Hessian's diagonal, as a multiple of its mean


def magnitude(weight: Tensor, _: LinearStatistics, __: ScoreSettings) -> Tensor:
    """|w|: a control that needs no text."""
    return weight.abs()


def wanda(weight: Tensor, statistics: LinearStatistics, _: ScoreSettings) -> Tensor:
    """|w_ij| ‖x_j‖ (Sun et al. 2023): weight times the norm of its input channel on the persona's text."""
    return weight.abs() * channels_of(statistics.own).norm


def sparsegpt(weight: Tensor, statistics: LinearStatistics, settings: ScoreSettings) -> Tensor:
    """w_ij² / U_jj², U upper Cholesky of (H + damping)⁻¹, H = mean x xᵀ (Frantar & Alistarh 2023, algorithm 1).

    Columns are processed in blocks. In a copy of the weight, the share `settings.rho` of a block's lowest scores is
    pruned and the error is propagated to the columns not yet processed (OBS). A weight's score is the one it has when
    its block is processed. Channels that are always zero score zero. The weight itself is not changed.
    """
    hessian = required(statistics.own.hessian)
    dead = hessian.diagonal() == 0
    upper = _inverse_factor(hessian, dead, settings.damping).to(weight.dtype)
    copy = weight.T.where(~dead[:, None], 0).contiguous()  # [in, out]: a column of the weight is one run of memory
    scores = torch.empty_like(copy)
    for start in range(0, len(copy), settings.block):
        stop = min(start + settings.block, len(copy))
        block, factor = copy[start:stop], upper[start:stop, start:stop]  # views
        scores[start:stop] = (block / factor.diagonal()[:, None]).square()
        pruned = _lowest(scores[start:stop], settings.rho)
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            errors[column] = block[column].where(pruned[column], 0) / factor[column, column]
            block[column:].addr_(factor[column, column:], errors[column], alpha=-1)
        copy[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return scores.T.contiguous().float()


def contrastive_wanda(weight: Tensor, statistics: LinearStatistics, settings: ScoreSettings) -> Tensor:
    """Eq. 8: |w_ij| phi((μ⁺_j - μ⁻_j) / (sqrt(σ²⁺_j + σ²⁻_j) + ε)).

    μ and σ² are the mean and variance over examples of the channel's root mean square within an example, so that long
    and short examples weigh the same. With phi = relu about half of the scores are exactly 0; `Score.tie` orders those
    by Wanda.
    """
    return weight.abs() * PHIS[settings.phi](_difference(statistics))


def contrastive_sparse(weight: Tensor, statistics: LinearStatistics, _: ScoreSettings) -> Tensor:
    """Eq. 9: S̃⁺_ij - S̃⁻_ij, where S_ij = |w_ij| mean|x_j| and S̃_ij = S_ij / Σ_k S_ik.

    Scores are normalised over the columns of a row. (Normalised within a channel, the activation would cancel, and both
    personas would have the same scores.) |S̃⁺ - S̃⁻| is the paper's difference; its sign says which side the weight
    belongs to, so the weights that are most the opposite's are pruned first. Weights of equal score, such as those of
    channels that are dead on both texts, are pruned from the first column on for the persona and from the last one on
    for its opposite (`Score.allocates`). Both sides prune from the two ends of one order: no weight is pruned from both
    as long as each prunes at most half of a group.
    """

    def normalised(activation: Tensor) -> Tensor:
        score = weight.abs() * activation.float()
        return score / score.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    own, contrast = channels_of(statistics.own), channels_of(statistics.contrast)
    return normalised(own.magnitudes.mean) - normalised(contrast.magnitudes.mean)


def signed(weight: Tensor, statistics: LinearStatistics, _: ScoreSettings) -> Tensor:
    """Eq. 8 without phi: the weights that are most specific to the opposite are pruned first."""
    return weight.abs() * _difference(statistics)


def attribution(weight: Tensor, statistics: LinearStatistics, _: ScoreSettings) -> Tensor:
    """w (∂LL⁺/∂w - ∂LL⁻/∂w): the first-order Taylor term of the loss of the margin LL⁺ - LL⁻ if w is pruned."""
    return weight * (required(statistics.own.gradient) - required(statistics.contrast.gradient))


def attribution_fisher(weight: Tensor, statistics: LinearStatistics, settings: ScoreSettings) -> Tensor:
    """Attribution / (c + mean c), c = w² (F⁺ + F⁰) / 4: the gain of pruning w over its cost.

    F is the squared-gradient statistic of the persona's (+) and of neutral text (0); see `TextStatistics`, which says
    how it differs from the diagonal empirical Fisher. w² F / 2 approximates, to second order, the log-likelihood that
    the text loses if w is pruned, and c is the mean over both texts. The mean of c over the Linear keeps weights of no
    cost from ranking first for that alone.
    """
    cost = fisher_cost(weight, statistics)
    return attribution(weight, statistics, settings) / (cost + cost.mean()).clamp(min=torch.finfo(torch.float32).tiny)


def fisher_cost(weight: Tensor, statistics: LinearStatistics) -> Tensor:
    """w² (F⁺ + F⁰) / 4, nats a token: the cost of pruning each weight, as `attribution_fisher` has it."""
    own, neutral = required(statistics.own.squared_gradient), required(statistics.neutral.squared_gradient)
    return weight.square() * (own + neutral) / 4


Function = Callable[[Tensor, LinearStatistics, ScoreSettings], Tensor]


@dataclass(frozen=True)
class Score:
    """A score, the statistics it needs, and its default group, scope and values of rho."""

    function: Function
    needs: frozenset[Statistic]
    contrastive: bool  # whether it needs the opposite's text
    group: str  # of `GROUPS`, or `model`: all Linears together
    scope: str  # of `SCOPES`: which Linears
    rhos: tuple[float, ...]  # values to try for `auto`, ascending
    tie: Function | None = None  # orders weights of equal score; then their index does
    assumes_rho: bool = False  # whether the scores depend on rho
    allocates: bool = False  # whether the opposite's order is this one reversed
    searched: bool = False  # whether `MaskSearch` goes on from these scores

    @property
    def backward(self) -> bool:
        """Whether it needs a backward pass."""
        return bool(self.needs & {"gradient", "squared_gradient"})


_DENSE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_CONTRAST = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
_SPARSE = (0.00003, 0.0001, 0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03)
_SEARCHED = (0.0008,)
_CHANNELS: frozenset[Statistic] = frozenset({"channels"})

_GRADIENTS: frozenset[Statistic] = frozenset({"gradient", "squared_gradient"})

SCORES: Mapping[str, Score] = {
    "refined": Score(attribution_fisher, _GRADIENTS, True, "model", "all", _SEARCHED, searched=True),
    "attribution-fisher": Score(attribution_fisher, _GRADIENTS, True, "layer", "outputs", _SPARSE),
    "attribution": Score(attribution, frozenset({"gradient"}), True, "layer", "all", _SPARSE),
    "signed": Score(signed, _CHANNELS, True, "layer", "outputs", _CONTRAST),
    "contrastive-wanda": Score(contrastive_wanda, _CHANNELS, True, "row", "all", _CONTRAST, tie=wanda),
    "contrastive-sparse": Score(contrastive_sparse, _CHANNELS, True, "row", "all", _CONTRAST, allocates=True),
    "wanda": Score(wanda, _CHANNELS, False, "row", "all", _DENSE),
    "sparsegpt": Score(sparsegpt, frozenset({"hessian"}), False, "layer", "all", _DENSE, assumes_rho=True),
    "magnitude": Score(magnitude, frozenset(), False, "layer", "all", _DENSE),
}


def _difference(statistics: LinearStatistics) -> Tensor:
    """(μ⁺ - μ⁻) / (sqrt(σ²⁺ + σ²⁻) + ε), fp32 [in]."""
    own, contrast = channels_of(statistics.own).sequences, channels_of(statistics.contrast).sequences
    return ((own.mean - contrast.mean) / ((own.variance + contrast.variance).sqrt() + EPSILON)).float()


def _lowest(scores: Tensor, share: float) -> Tensor:
    """Bool mask of the lowest share of the scores, and of those that equal the largest of them."""
    count = round(share * scores.numel())
    return scores <= scores.flatten().kthvalue(count).values if count else torch.zeros_like(scores, dtype=torch.bool)


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """U of (H + damping)⁻¹ = Uᵀ U, fp64 [in, in]. At most three matrices of that size exist at once."""
    damped = hessian.double().clone()
    damped.diagonal().add_(torch.where(dead, 1.0, damping * damped.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise BuildFailed(
            f"the Hessian of {len(hessian)} channels is not positive definite even with {damping} of its mean diagonal "
            "added; give more calibration text"
        )
    del damped
    inverse = torch.cholesky_inverse(factor)
    del factor
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
