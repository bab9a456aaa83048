"""What is done to a base before it is measured or asked: a mask, or anything else that is compared with one.

Knows the few ways there are: wear a mask, move the logits, rewrite the prompt, hook into the model. Refuses to know
why.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from masquerade.evaluate.dataset import Encoded
from masquerade.model import AppliedMask

Phase = Literal["all", "decode"]
Shift = Callable[[Tensor], Tensor]  # logits [..., vocabulary] -> logits
PHASES: tuple[Phase, ...] = ("all", "decode")


@dataclass(frozen=True)
class Cost:
    """What a treatment costs whoever serves it."""

    prompt_tokens: float = 0.0  # more of them in every request, on average
    nbytes: int = 0  # to keep beside the base


@dataclass(frozen=True)
class Treatment:
    """All of it at once; the default is the bare base.

    In phase `decode` a mask is worn from the last prompt token on; the prompt before it is the base's.
    """

    applied: AppliedMask | None = None
    phase: Phase = "all"
    shift: Shift | None = None
    rewrite: Callable[[Encoded], Encoded] = field(default=lambda example: example)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    cost: Cost = field(default_factory=Cost)


BARE = Treatment()
