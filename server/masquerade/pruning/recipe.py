"""The settings of a build, validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from masquerade.errors import InvalidValue
from masquerade.evaluate.treatment import PHASES
from masquerade.model import SCOPES
from masquerade.pruning.candidates import ScorePlan
from masquerade.pruning.scores import PHIS, SCORES, ScoreSettings
from masquerade.pruning.search import SearchSettings
from masquerade.pruning.selection import GROUPS, STRUCTURES
from masquerade.pruning.strength import STRENGTHS
from masquerade.pruning.tuning import Budgets

AUTOMATIC = "auto"
DIVERGENCE = 0.7  # target of a search's KL divergence beside the log of the neutral budget


@dataclass(frozen=True)
class Recipe:
    """The settings of a build. Raises `InvalidValue` with the field, its value and what is allowed."""

    score: str = AUTOMATIC  # of `SCORES`; what `auto` is depends on contrast and structure
    rho: float | Literal["auto"] = "auto"  # share pruned of each Linear; for `refined`, the most of all Linears
    group: str | None = None  # of `GROUPS`; None is the score's own; none for `refined`
    scope: str | None = None  # None is the score's own
    structure: str = "weights"  # of `STRUCTURES`: what is pruned; none but weights for `refined`
    phi: str = "relu"  # of `PHIS`, for contrastive-wanda
    tokens: Literal["response", "all"] = "response"  # positions that count in the statistics
    gamma: float | None = None  # default that the mask is published with; None is the score's own
    phase: Literal["auto", "all", "decode"] = "auto"  # default phase that it is published with
    strength: str = "normal"  # of `STRENGTHS`: what the mask may cost
    neutral_budget: float | None = None  # largest ratio of neutral text's perplexity; None is the strength's
    own_budget: float | None = None  # the same for the persona's own text
    effect: float = 0.95  # share of flipped prompts that is enough: no larger rho is tried
    samples: int | None = None  # most calibration examples of a side
    judged: int = 64  # most examples of a kind in the tune split, and in the report split
    judged_tokens: int = 8192  # most tokens of a kind in the tune split, and in the report split
    seed: int = 0
    force: bool = False  # publish a mask that would be refused, marked as forced

    def __post_init__(self) -> None:
        tables = (
            ("score", {AUTOMATIC, *SCORES}, SCORES),
            ("scope", SCOPES, SCOPES),
            ("group", GROUPS, GROUPS),
            ("structure", STRUCTURES, STRUCTURES),
            ("phi", PHIS, PHIS),
            ("tokens", ("response", "all"), ("response", "all")),
            ("strength", STRENGTHS, STRENGTHS),
            ("phase", (AUTOMATIC, *PHASES), (AUTOMATIC, *PHASES)),
        )
        for field, allowed, named in tables:
            choice = getattr(self, field)
            if choice is not None and choice not in allowed:
                raise InvalidValue(f"{field} {choice!r} is unknown; there are {', '.join(named)}", param=field)
        if self.rho != AUTOMATIC and not (isinstance(self.rho, int | float) and 0 < self.rho < 1):
            raise InvalidValue(f"rho is {self.rho!r}; it must lie between 0 and 1, or be `auto`", param="rho")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise InvalidValue(f"gamma is {self.gamma}; it must lie in [0, 1]", param="gamma")
        for field in ("neutral_budget", "own_budget"):
            if getattr(self, field) is not None and not getattr(self, field) >= 1:
                raise InvalidValue(f"{field} is {getattr(self, field)}; it must be at least 1", param=field)
        if not 0 < self.effect <= 1:
            raise InvalidValue(f"effect is {self.effect}; it must lie in (0, 1]", param="effect")
        for field in ("samples", "judged", "judged_tokens"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise InvalidValue(f"{field} is {getattr(self, field)}; it must be at least 1", param=field)

    @property
    def limits(self) -> Budgets:
        """The budgets of cost and effect."""
        neutral, own = STRENGTHS[self.strength]
        return Budgets(self.neutral_budget or neutral, self.own_budget or own, self.effect)

    @property
    def score_settings(self) -> ScoreSettings:
        """The parameters of the scores."""
        return ScoreSettings(phi=self.phi)

    @property
    def search_settings(self) -> SearchSettings:
        """The hyperparameters of a search."""
        rho = SCORES["refined"].rhos[0] if self.rho == AUTOMATIC else float(self.rho)
        divergence = DIVERGENCE * math.log(self.limits.neutral)
        return SearchSettings(rho=rho, divergence=divergence, seed=self.seed)

    def plan(self, contrast: bool) -> ScorePlan:
        """The score to use. `auto` is `refined`; for channels `attribution-fisher`; without a contrast `wanda`.

        Raises `InvalidValue` for a searched score with a group or channels, as it ranks single weights of all Linears
        together, or with a neutral budget that allows no divergence; and for channels within rows.
        """
        channels = self.structure == "channels"
        automatic = ("attribution-fisher" if channels else "refined") if contrast else "wanda"
        name = automatic if self.score == AUTOMATIC else self.score
        score = SCORES[name]
        if score.searched:
            self._check_search(name)
        if channels and self.group == "row":
            raise InvalidValue(
                "group 'row' has no meaning for the structure 'channels', as a channel has a weight in every row; "
                "leave it out",
                param="group",
            )
        group = "layer" if channels else self.group or score.group
        rhos = score.rhos if self.rho == AUTOMATIC else (float(self.rho),)
        return ScorePlan(name, group, self.scope or score.scope, rhos, self.structure)

    def _check_search(self, score: str) -> None:
        if self.structure == "channels":
            raise InvalidValue(
                f"structure 'channels' has no meaning for the score {score!r}, which searches for single weights; give "
                "another score, such as attribution-fisher",
                param="structure",
            )
        if self.group is not None:
            raise InvalidValue(
                f"group {self.group!r} has no meaning for the score {score!r}, which ranks the weights of all Linears "
                "together; leave it out, or give another score, such as attribution-fisher",
                param="group",
            )
        if not self.limits.neutral > 1:
            raise InvalidValue(
                f"neutral_budget is {self.neutral_budget}; the score {score!r} needs more than 1, as its number of "
                "weights follows the divergence that the budget allows",
                param="neutral_budget",
            )
