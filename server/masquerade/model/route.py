"""Which row of a packed batch wears what.

Knows spans of rows, masks and gammas. Refuses to know about requests. A route is data: it is handed to one forward pass
and forgotten after it, so no persona is ever current for the whole server.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from maskstore import MaskInfo
from masquerade.kernels import (
    Assignment,
    Correction,
    NativeMask,
    NativeParts,
    NativeProduct,
    NativeSpan,
    RowwiseCorrection,
    SparseCorrection,
    dense,
)

FEW = 4  # up to so many rows of a mask are corrected together with other masks' rows


@dataclass(frozen=True, eq=False)
class ResidentMask:
    """A mask on the device, ready to be worn: a correction for each of its targets.

    `numbers` are the places of the model's Linears in the native kernels' tables; what is not among them is corrected
    after the product.
    """

    digest: str
    info: MaskInfo
    corrections: Mapping[str, Correction]
    numbers: Mapping[str, int] = field(default_factory=dict)
    native: NativeParts | None = field(init=False)  # what the native kernels read
    beside: frozenset[str] = field(init=False)  # the targets that are not in it

    def __post_init__(self) -> None:
        native = {
            name: form
            for name, form in self.corrections.items()
            if isinstance(form, NativeMask) and name in self.numbers
        }
        object.__setattr__(self, "native", NativeParts(native, self.numbers) if native else None)
        object.__setattr__(self, "beside", self.corrections.keys() - native.keys())

    @property
    def nbytes(self) -> int:
        """Device bytes, beside the base's weights."""
        return sum(correction.nbytes for correction in self.corrections.values())


@dataclass(frozen=True)
class AppliedMask:
    """A mask at a strength: gamma 0 is the hard mask, gamma 1 the base."""

    mask: ResidentMask
    gamma: float


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of a packed batch wear the same."""

    applied: AppliedMask
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """All rows of a batch that wear one mask, whatever their gamma."""

    mask: ResidentMask
    rows: Tensor  # int64 [n]
    strength: Tensor  # 1 - gamma, fp32 [n, 1]


@dataclass(frozen=True)
class CorrectionPlan:
    """What is taken from one Linear's outputs for one batch."""

    rowwise: RowwiseCorrection | None  # sparse masks of few rows, together
    alone: Sequence[Group]  # all others

    def subtract(self, name: str, x: Tensor, y: Tensor) -> None:
        """Take from outputs y [rows, out] what corrections make of x [rows, in]. In place."""
        if self.rowwise:
            self.rowwise.subtract(x, y)
        for group in self.alone:
            worn = group.strength * group.mask.corrections[name](x[group.rows])
            y.index_add_(0, group.rows, worn.to(y.dtype), alpha=-1)


class Route:
    """Who wears what in one batch, and how each Linear's outputs come about for it.

    Rows of no span are the base's and cost nothing; a span's gamma is below 1. The native kernels' part is laid out at
    once for all Linears. What other corrections need is worked out when a Linear first needs it, and kept, so a route
    that serves many steps of the same rows costs little.
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans = tuple(spans)
        worn = [
            NativeSpan(native, 1 - span.applied.gamma, span.start, span.stop)
            for span in self.spans
            if (native := span.applied.mask.native) is not None
        ]
        self._product = NativeProduct(worn) if worn else None
        self._beside = any(span.applied.mask.beside for span in self.spans)
        self._groups: Sequence[Group] | None = None
        self._plans: dict[tuple[str, bool], CorrectionPlan] = {}

    def masks(self, name: str) -> bool:
        """Whether any row's mask prunes something of a Linear."""
        return name in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset().union(*(span.applied.mask.corrections for span in self.spans))

    def multiply(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs [..., out] of a Linear that the native kernels serve, as its rows' masks would have them; x is
        [..., in].
        """
        product = self._product
        number = product.find(name) if product else None
        y = product(x, weight, bias, number) if product and number is not None else dense(x, weight, bias)
        if self._beside:
            self._subtract(name, x, y, beside=True)
        return y

    def subtract(self, name: str, x: Tensor, y: Tensor) -> None:
        """Take from the outputs y [..., out] of a Linear what its rows' masks prune; x is [..., in]. In place."""
        self._subtract(name, x, y, beside=False)

    def _subtract(self, name: str, x: Tensor, y: Tensor, *, beside: bool) -> None:
        """The same, or only what is left to take after the native kernels."""
        if not y.numel():
            return
        key = name, beside
        if key not in self._plans:
            self._plans[key] = self._plan(name, beside, x.device)
        self._plans[key].subtract(name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))

    def _plan(self, name: str, beside: bool, device: torch.device) -> CorrectionPlan:
        if self._groups is None:
            self._groups = _group(self.spans, device)
        together: list[Assignment[SparseCorrection]] = []
        alone = []
        for group in self._groups:
            correction = group.mask.corrections.get(name)
            if correction is None or (beside and name not in group.mask.beside):
                continue
            if isinstance(correction, SparseCorrection) and len(group.rows) <= FEW:
                together.append(Assignment(correction, group.rows, group.strength))
            else:
                alone.append(group)
        return CorrectionPlan(RowwiseCorrection(together) if together else None, alone)


def _group(spans: Iterable[Span], device: torch.device) -> list[Group]:
    """The spans of a batch by mask."""
    by_mask: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_mask[span.applied.mask.digest].append(span)
    return [_unite(those, device) for those in by_mask.values()]


def _unite(spans: list[Span], device: torch.device) -> Group:
    rows = [row for span in spans for row in range(span.start, span.stop)]
    strengths = [1 - span.applied.gamma for span in spans for _ in range(span.start, span.stop)]
    return Group(
        spans[0].applied.mask, torch.tensor(rows, device=device), torch.tensor(strengths, device=device).view(-1, 1)
    )
