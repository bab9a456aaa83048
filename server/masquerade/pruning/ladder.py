"""The pruned sets of every score, side and rho that may be wanted, made while a layer's statistics are at hand.

Knows that scores are too large to keep, and that what is pruned at a few values of rho is not. Refuses to know which of
them is the best.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from maskstore import Bitmap, Sparse, Target
from maskstore import encode as encode_target
from masquerade.errors import BuildFailed
from masquerade.kernels import dense_weight
from masquerade.model import SCOPES
from masquerade.pruning.evidence import Evidence
from masquerade.pruning.scores import SCORES, Choices
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.selection import prune, rank


@dataclass(frozen=True)
class ScorePlan:
    """A score to try, within what, and at which values of rho."""

    score: str
    group: str
    scope: str
    rhos: tuple[float, ...]  # ascending
    least: tuple[float, ...] = ()  # smaller ones, descending


Rung = tuple[str, int, float]  # score, side, rho


class Ladder:
    """Targets by rung. Every layer's share is kept in `scratch`, so that a killed build finds it again."""

    def __init__(
        self, plans: tuple[ScorePlan, ...], sides: tuple[int, ...], choices: Choices, scratch: Scratch
    ) -> None:
        self._plans, self._sides, self._choices, self._scratch = plans, sides, choices, scratch
        self._targets: dict[Rung, dict[str, Target]] = defaultdict(dict)

    def climb(
        self, key: str, backward: bool, linears: Mapping[str, nn.Linear], evidence: Mapping[str, Evidence]
    ) -> Iterator[int]:
        """Score a layer's Linears with all scores that need a backward pass, or with all others.

        An item is one ranking of a Linear, or what is pruned at one rho; it gives how many Linears are done with it.
        """
        found: dict[str, Tensor] = {}
        for name, linear in linears.items():
            for choice in self._choose(name, linear, backward, evidence[name]):
                if choice is not None:
                    rung, target = choice
                    for part, array in target.tensors.items():
                        label = "|".join((*map(str, rung), name, part, str(target.shape[1])))
                        found[label] = torch.from_numpy(array.copy())
                yield 0
            yield 1
        self._scratch.put(f"ladder/{key}", found)

    def load(self, key: str) -> None:
        """Take in what `climb` kept under a key."""
        kept: dict[tuple[Rung, str, int], dict[str, Tensor]] = defaultdict(dict)
        for label, tensor in self._scratch.get(f"ladder/{key}").items():
            score, side, rho, name, part, columns = label.split("|")
            kept[(score, int(side), float(rho)), name, int(columns)][part] = tensor
        for (rung, module, width), parts in kept.items():
            arrays = {part: tensor.numpy() for part, tensor in parts.items()}
            known = Bitmap(arrays["keep"], width) if "keep" in arrays else Sparse(**arrays, columns=width)
            self._targets[rung][module] = known

    def targets(self, rung: Rung) -> dict[str, Target]:
        """The targets of a rung, by module name."""
        return self._targets[rung]

    def _choose(
        self, name: str, linear: nn.Linear, backward: bool, evidence: Evidence
    ) -> Iterator[tuple[Rung, Target] | None]:
        """What is pruned, by rung; None after a ranking."""
        for plan in self._plans:
            score = SCORES[plan.score]
            if score.backward != backward or not SCOPES[plan.scope](name):
                continue
            for side in self._sides:
                orders = self._rank(plan, linear, evidence, side)
                yield None
                for rho in (*plan.least, *plan.rhos):
                    pruned = prune(orders(rho), torch.Size((linear.out_features, linear.in_features)), rho)
                    yield (plan.score, side, rho), encode_target(pruned.cpu().numpy())

    def _rank(self, plan: ScorePlan, linear: nn.Linear, evidence: Evidence, side: int) -> Callable[[float], Tensor]:
        """rho -> places to prune; one ranking serves every rho unless the score itself assumes one."""
        score, weight = SCORES[plan.score], dense_weight(linear).float()
        backwards = score.allocates and side == -1
        if side == -1:
            evidence = evidence.swapped()

        def order(rho: float) -> Tensor:
            choices = replace(self._choices, rho=rho)
            values = score.function(weight, evidence, choices)
            if not bool(values.isfinite().all()):
                raise BuildFailed(f"the score {plan.score!r} is not finite; are there NaN among the base's weights?")
            tie = score.tie and score.tie(weight, evidence, choices)
            return rank(values, rho, plan.group, tie, backwards)

        if score.assumes_rho:
            return order
        longest = order(plan.rhos[-1])
        return lambda _: longest
