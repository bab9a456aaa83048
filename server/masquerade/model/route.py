"""Which rows of a packed batch have which applied mask, and the Linears' outputs that result.

A route is data of one forward pass, so the server has no current persona.
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
    multiply_base,
)

FEW = 4  # most rows of a mask that are corrected together with other masks' rows


@dataclass(frozen=True, eq=False)
class ResidentMask:
    """A mask on the device: a correction for each of its targets.

    `indices` maps the model's Linears to their places in the native kernels' tables.
    """

    digest: str
    info: MaskInfo
    corrections: Mapping[str, Correction]
    indices: Mapping[str, int] = field(default_factory=dict)
    native: NativeParts | None = field(init=False)  # the targets that the native kernels multiply
    separate: frozenset[str] = field(init=False)  # all other targets, corrected after the product

    def __post_init__(self) -> None:
        native = {
            name: correction
            for name, correction in self.corrections.items()
            if isinstance(correction, NativeMask) and name in self.indices
        }
        object.__setattr__(self, "native", NativeParts(native, self.indices) if native else None)
        object.__setattr__(self, "separate", self.corrections.keys() - native.keys())

    @property
    def nbytes(self) -> int:
        """Device bytes, without the base's weights."""
        return sum(correction.nbytes for correction in self.corrections.values())


@dataclass(frozen=True)
class AppliedMask:
    """A mask at a gamma: 0 is the hard mask, 1 the base."""

    mask: ResidentMask
    gamma: float


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of a packed batch have the same applied mask."""

    applied: AppliedMask
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """All rows of a batch with one mask, each at its own strength."""

    mask: ResidentMask
    rows: Tensor  # int64 [n]
    strength: Tensor  # 1 - gamma, fp32 [n, 1]


@dataclass(frozen=True)
class CorrectionPlan:
    """The corrections of one Linear's outputs for one batch."""

    rowwise: RowwiseCorrection | None  # of sparse masks with few rows, together
    groups: Sequence[Group]  # all others, one by one

    def subtract(self, name: str, x: Tensor, y: Tensor) -> None:
        """Subtract the corrections of inputs x [rows, in] from outputs y [rows, out], in place."""
        if self.rowwise:
            self.rowwise.subtract(x, y)
        for group in self.groups:
            pruned = group.strength * group.mask.corrections[name](x[group.rows])
            y.index_add_(0, group.rows, pruned.to(y.dtype), alpha=-1)


class Route:
    """The masks of a batch's rows, applied to each Linear.

    Rows of no span are the base's and cost nothing; a span's gamma is below 1. Spans for the native kernels are packed
    once for all Linears. Other corrections are planned on a Linear's first call and cached, so reuse a route while the
    rows stay the same.
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans = tuple(spans)
        native_spans = [
            NativeSpan(native, 1 - span.applied.gamma, span.start, span.stop)
            for span in self.spans
            if (native := span.applied.mask.native) is not None
        ]
        self._product = NativeProduct(native_spans) if native_spans else None
        self._has_separate = any(span.applied.mask.separate for span in self.spans)
        self._groups: dict[torch.device, Sequence[Group]] = {}
        self._plans: dict[tuple[str, bool], CorrectionPlan] = {}

    @property
    def is_native(self) -> bool:
        """Whether the native kernels apply all masks, in every Linear that they support."""
        return not self._has_separate

    @property
    def product(self) -> NativeProduct | None:
        """The native kernels' product of the batch; None if they apply no mask."""
        return self._product

    def masks(self, name: str) -> bool:
        """Whether any row's mask prunes weights of a Linear."""
        return name in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset().union(*(span.applied.mask.corrections for span in self.spans))

    def multiply(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The masked outputs [..., out] of a Linear that the native kernels support, for inputs x [..., in]."""
        product = self._product
        index = product.find(name) if product else None
        y = product(x, weight, bias, index) if product and index is not None else multiply_base(x, weight, bias)
        if self._has_separate:
            self.subtract(name, x, y, separate=True)
        return y

    def multiply_merged(
        self, names: tuple[str, ...], outs: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The masked outputs [..., sum of outs] of Linears with merged weights [sum of outs, in], for inputs x."""
        y = multiply_base(x, weight, bias)
        if self._has_separate:
            for name, own in zip(names, torch.split(y, list(outs), -1), strict=True):
                self.subtract(name, x, own)
        return y

    def subtract(self, name: str, x: Tensor, y: Tensor, *, separate: bool = False) -> None:
        """Subtract from a Linear's base outputs y [..., out], in place, what its rows' masks prune; x is [..., in].

        If `separate`, without the corrections that the native kernels have applied.
        """
        if not y.numel():
            return
        key = name, separate
        if key not in self._plans:
            self._plans[key] = self._plan(name, separate, x.device)
        self._plans[key].subtract(name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))

    def _plan(self, name: str, separate: bool, device: torch.device) -> CorrectionPlan:
        if device not in self._groups:
            self._groups[device] = _group(self.spans, device)
        together: list[Assignment[SparseCorrection]] = []
        one_by_one = []
        for group in self._groups[device]:
            correction = group.mask.corrections.get(name)
            if correction is None or (separate and name not in group.mask.separate):
                continue
            if isinstance(correction, SparseCorrection) and len(group.rows) <= FEW:
                together.append(Assignment(correction, group.rows, group.strength))
            else:
                one_by_one.append(group)
        return CorrectionPlan(RowwiseCorrection(together) if together else None, one_by_one)


def _group(spans: Iterable[Span], device: torch.device) -> list[Group]:
    """Group the spans of a batch by mask."""
    by_mask: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_mask[span.applied.mask.digest].append(span)
    return [_merge(same, device) for same in by_mask.values()]


def _merge(spans: list[Span], device: torch.device) -> Group:
    rows = [row for span in spans for row in range(span.start, span.stop)]
    strengths = [1 - span.applied.gamma for span in spans for _ in range(span.start, span.stop)]
    return Group(
        spans[0].applied.mask, torch.tensor(rows, device=device), torch.tensor(strengths, device=device).view(-1, 1)
    )
