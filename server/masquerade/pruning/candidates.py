"""The candidate masks of every side and rho, found while a layer's statistics are in memory.

Scores are too large to keep for all layers; the weights that are pruned at a few values of rho are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskstore import Bitmap, Sparse, Target
from maskstore import encode as encode_target
from masquerade.errors import BuildFailed
from masquerade.kernels import dense_weight
from masquerade.model import SCOPES
from masquerade.pruning.scores import SCORES, ScoreSettings
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.selection import prune, rank
from masquerade.pruning.statistics import LinearStatistics


@dataclass(frozen=True)
class ScorePlan:
    """A score to try, with its group, its scope, what it prunes and the values of rho."""

    score: str
    group: str
    scope: str
    rhos: tuple[float, ...]  # ascending
    structure: str = "weights"  # of `STRUCTURES`


def pack(targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Targets as tensors that a `Scratch` can keep."""
    return {
        f"{label}|{part}|{target.shape[1]}": torch.from_numpy(array.copy())
        for label, target in targets.items()
        for part, array in target.tensors.items()
    }


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Target]:
    """The targets that `pack` was given."""
    parts: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for key, tensor in tensors.items():
        label, part, columns = key.rsplit("|", 2)
        parts[label, int(columns)][part] = tensor.numpy()
    return {
        label: Bitmap(arrays["keep"], columns) if "keep" in arrays else Sparse(**arrays, columns=columns)
        for (label, columns), arrays in parts.items()
    }


CandidateKey = tuple[str, int, float]  # score, side, rho


class CandidateMasks:
    """Targets by candidate. Every layer's part is kept in `scratch`, where a resumed build finds it."""

    def __init__(self, plan: ScorePlan, sides: tuple[int, ...], settings: ScoreSettings, scratch: Scratch) -> None:
        self._plan, self._sides, self._settings, self._scratch = plan, sides, settings, scratch
        self._targets: dict[CandidateKey, dict[str, Target]] = defaultdict(dict)

    def score_layer(
        self, key: str, backward: bool, linears: Mapping[str, nn.Linear], statistics: Mapping[str, LinearStatistics]
    ) -> Iterator[int]:
        """Score a layer's Linears if the score needs a backward pass or not, as `backward` says.

        A work item is one ranking of a Linear, or the selection at one rho. It yields the number of Linears that it
        completes.
        """
        found: dict[str, Target] = {}
        for name, linear in linears.items():
            for selected in self._select(name, linear, backward, statistics[name]):
                if selected is not None:
                    candidate, target = selected
                    found["|".join((*map(str, candidate), name))] = target
                yield 0
            yield 1
        self._scratch.put(f"ladder/{key}", pack(found))

    def load(self, key: str) -> None:
        """Read what `score_layer` kept under a key."""
        for label, target in unpack(self._scratch.get(f"ladder/{key}")).items():
            score, side, rho, name = label.split("|")
            self._targets[score, int(side), float(rho)][name] = target

    def targets(self, candidate: CandidateKey) -> dict[str, Target]:
        """The targets of a candidate, by module name."""
        return self._targets[candidate]

    def _select(
        self, name: str, linear: nn.Linear, backward: bool, statistics: LinearStatistics
    ) -> Iterator[tuple[CandidateKey, Target] | None]:
        """The pruned weights of each candidate; None after a ranking."""
        plan, score = self._plan, SCORES[self._plan.score]
        if score.backward != backward or not SCOPES[plan.scope](name):
            return
        for side in self._sides:
            orders = self._rank(plan, linear, statistics, side)
            yield None
            shape = torch.Size((linear.out_features, linear.in_features))
            ranked = torch.Size((1, linear.in_features)) if plan.structure == "channels" else shape
            for rho in plan.rhos:
                pruned = prune(orders(rho), ranked, rho).expand(shape)
                yield (plan.score, side, rho), encode_target(pruned.cpu().numpy())

    def _rank(
        self, plan: ScorePlan, linear: nn.Linear, statistics: LinearStatistics, side: int
    ) -> Callable[[float], Tensor]:
        """rho -> indices to prune, of weights or of channels, whose score is the sum of their weights'.

        One ranking serves every rho, unless the score depends on rho.
        """
        score, weight = SCORES[plan.score], dense_weight(linear).float()
        backwards = score.allocates and side == -1
        if side == -1:
            statistics = statistics.swapped()

        def order(rho: float) -> Tensor:
            settings = replace(self._settings, rho=rho)
            values = score.function(weight, statistics, settings)
            if not bool(values.isfinite().all()):
                raise BuildFailed(f"the score {plan.score!r} is not finite; are there NaN among the base's weights?")
            tie = score.tie and score.tie(weight, statistics, settings)
            if plan.structure == "channels":
                values, tie = values.sum(0, keepdim=True), None if tie is None else tie.sum(0, keepdim=True)
            return rank(values, rho, plan.group, tie, backwards)

        if score.assumes_rho:
            return order
        longest = order(plan.rhos[-1])
        return lambda _: longest
