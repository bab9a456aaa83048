"""How a mask is to be made: every setting of a build, checked.

Knows which settings there are and what they may be. Refuses to know how they are followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masquerade.errors import InvalidValue
from masquerade.evaluate.treatment import PHASES
from masquerade.model import SCOPES
from masquerade.pruning.ladder import ScorePlan
from masquerade.pruning.scores import AUTO, PHIS, SCORES, Choices
from masquerade.pruning.selection import GROUPS
from masquerade.pruning.tuning import Budgets

AUTOMATIC = "auto"


@dataclass(frozen=True)
class Recipe:
    """How a mask is made. Raises `InvalidValue` with the choices there are."""

    score: str = AUTOMATIC  # of `SCORES`; `auto` compares those of `AUTO`
    rho: float | Literal["auto"] = "auto"  # share pruned of each Linear
    group: str | None = None  # None is the score's own
    scope: str | None = None  # None is the score's own
    phi: str = "relu"  # of `PHIS`, for contrastive-wanda
    tokens: Literal["response", "all"] = "response"  # which positions are counted
    gamma: float = 0.0  # default strength that the mask is published with
    phase: Literal["auto", "all", "decode"] = "auto"  # default phase that it is published with
    neutral_budget: float = 1.02  # most that the mask may multiply the perplexity of neutral text with
    own_budget: float = 1.05  # ... and of the persona's own text
    effect: float = 0.95  # share of flipped prompts from which a larger rho is not looked for
    samples: int | None = None  # most calibration examples of a side
    judged: int = 100  # most examples of a kind to choose by, and as many to judge by
    judged_tokens: int = 8192  # most tokens of a kind to choose by, and as many to judge by
    seed: int = 0
    force: bool = False  # give the mask even if it would be refused, marked as such

    def __post_init__(self) -> None:
        tables = (
            ("score", {AUTOMATIC, *SCORES}, SCORES),
            ("scope", SCOPES, SCOPES),
            ("group", GROUPS, GROUPS),
            ("phi", PHIS, PHIS),
            ("tokens", ("response", "all"), ("response", "all")),
            ("phase", (AUTOMATIC, *PHASES), (AUTOMATIC, *PHASES)),
        )
        for field, allowed, named in tables:
            choice = getattr(self, field)
            if choice is not None and choice not in allowed:
                raise InvalidValue(f"{field} {choice!r} is unknown; there are {', '.join(named)}", param=field)
        if self.rho != AUTOMATIC and not (isinstance(self.rho, int | float) and 0 < self.rho < 1):
            raise InvalidValue(f"rho is {self.rho!r}; it must lie between 0 and 1, or be `auto`", param="rho")
        if not 0 <= self.gamma <= 1:
            raise InvalidValue(f"gamma is {self.gamma}; it must lie in [0, 1]", param="gamma")
        for field in ("neutral_budget", "own_budget"):
            if not getattr(self, field) >= 1:
                raise InvalidValue(f"{field} is {getattr(self, field)}; it must be at least 1", param=field)
        if not 0 < self.effect <= 1:
            raise InvalidValue(f"effect is {self.effect}; it must lie in (0, 1]", param="effect")
        for field in ("samples", "judged", "judged_tokens"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise InvalidValue(f"{field} is {getattr(self, field)}; it must be at least 1", param=field)

    @property
    def limits(self) -> Budgets:
        """What a mask may cost, and how much effect is enough."""
        return Budgets(self.neutral_budget, self.own_budget, self.effect, self.force)

    @property
    def choices(self) -> Choices:
        """What the scores leave to decide."""
        return Choices(phi=self.phi)

    def plans(self, contrast: bool) -> tuple[ScorePlan, ...]:
        """The scores to try. `auto` without a contrast has one choice, `wanda`: the others compare two speakers."""
        automatic = AUTO if contrast else ("wanda",)
        names = automatic if self.score == AUTOMATIC else (self.score,)
        return tuple(
            ScorePlan(
                name,
                self.group or SCORES[name].group,
                self.scope or SCORES[name].scope,
                *((SCORES[name].rhos, SCORES[name].least) if self.rho == AUTOMATIC else ((float(self.rho),),)),
            )
            for name in names
        )
