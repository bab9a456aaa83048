"""What is applied to a base before it is measured: a mask, or a control that is compared with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from masquerade.evaluate.dataset import Encoded
from masquerade.model import AppliedMask

Phase = Literal["all", "decode"]
Shift = Callable[[Tensor], Tensor]  # logits [..., vocabulary] -> logits
PHASES: tuple[Phase, ...] = ("all", "decode")


@dataclass(frozen=True)
class Treatment:
    """The parts of a treatment, which may be combined; the default leaves the base unchanged.

    In phase `decode` the mask applies from the last prompt token on, and not to the tokens before it.
    """

    applied: AppliedMask | None = None
    phase: Phase = "all"
    shift: Shift | None = None
    rewrite: Callable[[Encoded], Encoded] = field(default=lambda example: example)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    nbytes: int = 0  # memory beside the base

    @property
    def leaves_prompts(self) -> bool:
        """Whether the keys and values of a prompt's tokens but the last are the base's."""
        return self.around is nullcontext and (self.applied is None or self.phase == "decode")

    def count_added(self, examples: Sequence[Encoded]) -> float:
        """Mean number of tokens that the treatment adds to a prompt."""
        added = sum(len(self.rewrite(example).prompt) - len(example.prompt) for example in examples)
        return added / max(1, len(examples))


@contextmanager
def _change_nothing() -> Iterator[None]:
    yield


UNTREATED = Treatment()
HOOKED = Treatment(
    around=_change_nothing
)  # the base as it is computed where there may be hooks, which rounds otherwise
