"""How much each weight is worth keeping to a persona.

Knows pure functions of a weight and of what calibration text shows about it. Refuses to know how many weights are
pruned: the lowest scores go. Every function maps weight [out, in], fp32, to scores [out, in]; "+" is the persona, "-"
its opposite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from masquerade.errors import BuildFailed
from masquerade.pruning.evidence import Evidence, Kind, channels, given

EPSILON = 1e-6  # keeps channels that never fire from dividing by zero

PHIS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "softplus": F.softplus}


@dataclass(frozen=True)
class Choices:
    """What a recipe decides about the scores that leave something to decide."""

    phi: str = "relu"  # of `PHIS`; contrastive-wanda
    rho: float = 0.5  # share that sparsegpt assumes pruned when it carries errors on
    block: int = 128  # columns that sparsegpt decides at once
    damping: float = 0.01  # of the mean of the Hessian's diagonal, added to it


def magnitude(weight: Tensor, _: Evidence, __: Choices) -> Tensor:
    """|w|: the control that reads no text."""
    return weight.abs()


def wanda(weight: Tensor, evidence: Evidence, _: Choices) -> Tensor:
    """|w_ij| ‖x_j‖ (Sun et al. 2023): weight times the norm of its input channel on the persona's text."""
    return weight.abs() * channels(evidence.own).norm


def sparsegpt(weight: Tensor, evidence: Evidence, choices: Choices) -> Tensor:
    """w_ij² / U_jj², U upper Cholesky of (H + damping)⁻¹, H = mean x xᵀ (Frantar & Alistarh 2023, algorithm 1).

    Columns are visited in blocks. In a scoring copy of the weight the share `choices.rho` of a block's lowest scores is
    pruned and its error carried on to the columns not yet visited (OBS); a weight's score is the one it had when its
    block was visited. Channels that are always zero score zero. The weight itself is not changed.
    """
    hessian = given(evidence.own.hessian)
    silent = hessian.diagonal() == 0
    upper = _inverse_factor(hessian, silent, choices.damping).to(weight.dtype)
    copy = weight.T.where(~silent[:, None], 0).contiguous()  # [in, out]: a column of the weight is one run of memory
    scores = torch.empty_like(copy)
    for start in range(0, len(copy), choices.block):
        stop = min(start + choices.block, len(copy))
        block, factor = copy[start:stop], upper[start:stop, start:stop]  # views
        scores[start:stop] = (block / factor.diagonal()[:, None]).square()
        pruned = _lowest(scores[start:stop], choices.rho)
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            errors[column] = block[column].where(pruned[column], 0) / factor[column, column]
            block[column:].addr_(factor[column, column:], errors[column], alpha=-1)
        copy[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return scores.T.contiguous().float()


def contrastive_wanda(weight: Tensor, evidence: Evidence, choices: Choices) -> Tensor:
    """Eq. 8: |w_ij| phi((μ⁺_j - μ⁻_j) / (sqrt(σ²⁺_j + σ²⁻_j) + ε)).

    μ and σ² are of the channel's root mean square within an example, over examples, so that long examples weigh no
    more than short ones. With phi = relu about half of the scores are exactly 0; `Score.tie` orders those by Wanda.
    """
    return weight.abs() * PHIS[choices.phi](_difference(evidence))


def contrastive_sparse(weight: Tensor, evidence: Evidence, _: Choices) -> Tensor:
    """Eq. 9: S̃⁺_ij - S̃⁻_ij, where S_ij = |w_ij| mean|x_j| and S̃_ij = S_ij / Σ_k S_ik.

    Scores are normalised over the columns of a row. (Within a channel, the activation would cancel, and both personas
    would have the same scores.) |S̃⁺ - S̃⁻| is the paper's difference; its sign says to whom the weight belongs, so what
    belongs most to the opposite goes first. Weights of equal score, such as all those of channels that are silent for
    both, are pruned from the first column on for the persona and from the last one on for its opposite
    (`Score.allocates`). So one order serves both sides, from its two ends: no weight is pruned from both as long as
    each prunes at most half of a group.
    """

    def normalised(activation: Tensor) -> Tensor:
        score = weight.abs() * activation.float()
        return score / score.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    own, contrast = channels(evidence.own), channels(evidence.contrast)
    return normalised(own.magnitudes.mean) - normalised(contrast.magnitudes.mean)


def signed(weight: Tensor, evidence: Evidence, _: Choices) -> Tensor:
    """Eq. 8 without phi: what is most specific to the opposite goes first."""
    return weight.abs() * _difference(evidence)


def attribution(weight: Tensor, evidence: Evidence, _: Choices) -> Tensor:
    """w (∂LL⁺/∂w - ∂LL⁻/∂w): to first order (Taylor), what the margin LL⁺ - LL⁻ loses if w is pruned."""
    return weight * (given(evidence.own.gradient) - given(evidence.contrast.gradient))


def attribution_fisher(weight: Tensor, evidence: Evidence, choices: Choices) -> Tensor:
    """Attribution / (c + mean c), c = w² (F⁺ + F⁰) / 4: what pruning gains, for what it costs.

    F is the diagonal empirical Fisher information of the persona's (+) and of neutral text (0); w² F / 2 is, to second
    order, what pruning w costs the likelihood of that text, and c is the mean of both. The mean of c over the Linear
    keeps weights that cost nothing from winning.
    """
    cost = weight.square() * (given(evidence.own.fisher) + given(evidence.neutral.fisher)) / 4
    return attribution(weight, evidence, choices) / (cost + cost.mean()).clamp(min=torch.finfo(torch.float32).tiny)


Function = Callable[[Tensor, Evidence, Choices], Tensor]


@dataclass(frozen=True)
class Score:
    """A score, the statistics it reads, and the settings that suit it."""

    function: Function
    needs: frozenset[Kind]
    contrastive: bool  # whether it reads the opposite's text
    group: str  # within which the lowest scores are chosen
    scope: str  # which Linears
    rhos: tuple[float, ...]  # shares to try for `auto`, ascending
    least: tuple[float, ...] = ()  # smaller ones, descending, tried where none of those keeps the budgets
    tie: Function | None = None  # what orders weights of equal score; after it, their index
    assumes_rho: bool = False  # whether the scores themselves depend on the share pruned
    allocates: bool = False  # whether a weight goes to one side: the opposite's order is this one, backwards

    @property
    def backward(self) -> bool:
        """Whether it needs more than forward passes."""
        return bool(self.needs & {"gradient", "fisher"})


_DENSE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_CONTRAST = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
_SPARSE = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03)
_SPARSER = (0.0003, 0.0001)
_CHANNELS: frozenset[Kind] = frozenset({"channels"})

SCORES: Mapping[str, Score] = {
    "attribution-fisher": Score(
        attribution_fisher, frozenset({"gradient", "fisher"}), True, "layer", "outputs", _SPARSE, _SPARSER
    ),
    "attribution": Score(attribution, frozenset({"gradient"}), True, "layer", "all", _SPARSE, _SPARSER),
    "signed": Score(signed, _CHANNELS, True, "layer", "outputs", _CONTRAST),
    "contrastive-wanda": Score(contrastive_wanda, _CHANNELS, True, "row", "all", _CONTRAST, tie=wanda),
    "contrastive-sparse": Score(contrastive_sparse, _CHANNELS, True, "row", "all", _CONTRAST, allocates=True),
    "wanda": Score(wanda, _CHANNELS, False, "row", "all", _DENSE),
    "sparsegpt": Score(sparsegpt, frozenset({"hessian"}), False, "layer", "all", _DENSE, assumes_rho=True),
    "magnitude": Score(magnitude, frozenset(), False, "layer", "all", _DENSE),
}
AUTO = ("attribution-fisher", "attribution", "signed")  # what `auto` compares


def _difference(evidence: Evidence) -> Tensor:
    """(μ⁺ - μ⁻) / (sqrt(σ²⁺ + σ²⁻) + ε), fp32 [in]."""
    own, contrast = channels(evidence.own).sequences, channels(evidence.contrast).sequences
    return ((own.mean - contrast.mean) / ((own.variance + contrast.variance).sqrt() + EPSILON)).float()


def _lowest(scores: Tensor, share: float) -> Tensor:
    """Bool, where a share of the scores is lowest, and what equals the largest of them."""
    count = round(share * scores.numel())
    return scores <= scores.flatten().kthvalue(count).values if count else torch.zeros_like(scores, dtype=torch.bool)


def _inverse_factor(hessian: Tensor, silent: Tensor, damping: float) -> Tensor:
    """U of (H + damping)⁻¹ = Uᵀ U, fp64 [in, in]. Of the four matrices of that size no more than three live at once."""
    damped = hessian.double().clone()
    damped.diagonal().add_(torch.where(silent, 1.0, damping * damped.diagonal().mean()))
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
