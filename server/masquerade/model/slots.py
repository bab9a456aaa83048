"""A batch's route for kernels that take masks by number: everything they read is in tensors that stay put.

Knows how spans become slots, strengths, tiles and a table of addresses, and how a Linear's product is corrected by one
launch for the whole batch. Refuses to know requests, and where masks are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from masquerade.kernels.cuda import CudaBits, CudaList, find_kernels
from masquerade.kernels.tiles import FIELDS, Tiles, tile
from masquerade.model.route import ResidentMask, Route, Span
from masquerade.model.staging import Layout, Staging

MANY = 8  # rows of one mask from which on they are taken together
_LISTED_WIDTHS = (1, 32)  # rows of a tile, for masks of few rows and of many
_BITMAP_WIDTHS = (16, 64)


@dataclass(frozen=True)
class TableEntries:
    """What a table says of a mask."""

    names: tuple[str, ...]  # of its Linears, sorted
    addresses: NDArray[np.int64]  # [names, FIELDS]
    listed: frozenset[str]  # Linears for which it has a list
    bitmaps: frozenset[str]  # and those for which it has a bitmap


_ENTRIES: WeakKeyDictionary[ResidentMask, TableEntries | None] = WeakKeyDictionary()


def make_route(spans: Iterable[Span], device: torch.device) -> Route:
    """The route of a batch, by the kernels that serve its masks. Rows of no span, and rows at gamma 1, are the base's
    and cost nothing.
    """
    spans = [span for span in spans if span.applied.gamma < 1]
    masks = [span.applied.mask for span in spans]
    if masks and masks[0].native is None and all(find_entries(mask) is not None for mask in masks):
        return SlotRoute(spans, device)
    return Route(spans)


def find_entries(mask: ResidentMask) -> TableEntries | None:
    """What a table says of a mask, if kernels can find all of its corrections by address. Worked out once."""
    if mask not in _ENTRIES:
        forms: list[tuple[str, Any]] = sorted(mask.corrections.items(), key=lambda form: form[0])
        fits = forms and all(isinstance(form, (CudaBits, CudaList)) for _, form in forms)
        _ENTRIES[mask] = _describe(forms) if fits else None
    return _ENTRIES[mask]


def _describe(forms: list[tuple[str, CudaBits | CudaList]]) -> TableEntries:
    return TableEntries(
        tuple(name for name, _ in forms),
        np.stack([form.addresses for _, form in forms]),
        frozenset(name for name, form in forms if isinstance(form, CudaList)),
        frozenset(name for name, form in forms if isinstance(form, CudaBits)),
    )


@dataclass(frozen=True)
class SlotShape:
    """What must be equal for one set of tensors, and one CUDA graph, to serve two batches."""

    rows: int
    slots: int
    listed: tuple[str, ...]  # Linears for which some mask has a list
    bitmaps: tuple[str, ...]  # and some mask has a bitmap
    listed_tiles: tuple[int, int]  # how many, how wide
    bitmap_tiles: tuple[int, int]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The Linears that are corrected, in the table's order."""
        return tuple(sorted({*self.listed, *self.bitmaps}))

    @property
    def layout(self) -> Layout:
        """The tensors of a batch."""
        i32, (listed, width), (bitmaps, wide) = torch.int32, self.listed_tiles, self.bitmap_tiles
        return {
            "table": (torch.int64, (len(self.names), self.slots, FIELDS)),
            "strengths": (torch.float32, (self.rows,)),
            "listed_slots": (i32, (listed,)),
            "listed_rows": (i32, (listed, width)),
            "bitmap_slots": (i32, (bitmaps,)),
            "bitmap_rows": (i32, (bitmaps, wide)),
        }


@dataclass(frozen=True)
class SlotMap:
    """Who wears what in one batch: masks by slot, and every row's slot and strength."""

    masks: tuple[ResidentMask, ...]
    slots: NDArray[np.int32]  # [rows], -1 for the base
    strengths: NDArray[np.float32]  # 1 - gamma, [rows]

    @classmethod
    def of(cls, spans: Sequence[Span], rows: int) -> SlotMap:
        """Sort out the spans of a batch. Rows at gamma 1 are the base's."""
        slots, strengths = np.full(rows, -1, np.int32), np.zeros(rows, np.float32)
        numbers: dict[str, int] = {}
        masks: list[ResidentMask] = []
        for span in spans:
            if span.applied.gamma < 1:
                mask = span.applied.mask
                number = numbers.setdefault(mask.digest, len(masks))
                masks += [mask] * (number == len(masks))
                slots[span.start : span.stop] = number
                strengths[span.start : span.stop] = 1 - span.applied.gamma
        return cls(tuple(masks), slots, strengths)

    def frame(self) -> SlotShape:
        """Just large enough for this batch."""
        most = int(np.bincount(self.slots[self.slots >= 0], minlength=1).max())
        widths = [pair[most >= MANY] for pair in (_LISTED_WIDTHS, _BITMAP_WIDTHS)]
        counts = [len(tile(part, width)[0]) for part, width in zip((self._worn(), self.slots), widths, strict=True)]
        rows, slots = len(self.slots), len(self.masks)
        return SlotShape(rows, slots, *self._kinds, (counts[0], widths[0]), (counts[1], widths[1]))

    def padded_frame(self, rows: int) -> SlotShape:
        """For a decode step of up to `rows` rows: the tiles of the worst case, so that only `rows` and kinds matter."""
        return SlotShape(rows, rows, *self._kinds, (rows, _LISTED_WIDTHS[0]), (rows, _BITMAP_WIDTHS[0]))

    def fill(self, frame: SlotShape) -> dict[str, NDArray[Any]]:
        """The contents of a frame's tensors; what this batch does not need wears nothing."""
        table = np.zeros((len(frame.names), frame.slots, FIELDS), np.int64)
        for slot, entries in enumerate(self._entries):
            table[_places(entries.names, frame.names), slot] = entries.addresses
        arrays: dict[str, NDArray[Any]] = {"table": table, "strengths": _pad(self.strengths, frame.rows, 0)}
        slots = _pad(self.slots, frame.rows, -1)
        for kind, (count, width) in (("listed", frame.listed_tiles), ("bitmap", frame.bitmap_tiles)):
            numbers, rows = tile(slots, width)
            if kind == "listed":  # the others' rows are left alone
                numbers, rows = numbers[numbers >= 0], rows[numbers >= 0]
            arrays[f"{kind}_slots"], arrays[f"{kind}_rows"] = _pad(numbers, count, -1), _pad(rows, count, -1)
        return arrays

    @property
    def _entries(self) -> list[TableEntries]:
        found = [find_entries(mask) for mask in self.masks]
        return [entries for entries in found if entries is not None]

    @cached_property
    def _kinds(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The Linears for which some mask has a list, and those for which some has a bitmap."""
        listed = frozenset(entries.listed for entries in self._entries)
        return _unite(listed), _unite(frozenset(entries.bitmaps for entries in self._entries))

    def _worn(self) -> NDArray[np.int32]:
        return self.slots[self.slots >= 0]


class Slots:
    """The tensors of one frame, and the launches that read them. Not thread-safe, as the model is not."""

    def __init__(self, frame: SlotShape, device: torch.device) -> None:
        self.frame = frame
        self._kernels: Any = find_kernels()
        self._staging = Staging(frame.layout, device)
        tensors = self._staging.tensors
        self._strengths = tensors["strengths"]
        self._tables = dict(zip(frame.names, tensors["table"], strict=True))
        self._listed = Tiles(tensors["listed_slots"], tensors["listed_rows"])
        self._bitmaps = Tiles(tensors["bitmap_slots"], tensors["bitmap_rows"])

    def write(self, slot_map: SlotMap) -> None:
        """Serve this batch from now on; it must fit the frame. Its masks must live for as long as it is served."""
        self._staging.write(slot_map.fill(self.frame))

    def masks(self, name: str) -> bool:
        """Whether any row's mask prunes something of a Linear."""
        return name in self._tables

    def multiply(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs [..., out] of a Linear for inputs [..., in], as the rows' masks would have them."""
        out, columns = weight.shape
        if name in self.frame.bitmaps:
            y = x.new_empty(*x.shape[:-1], out)
            self._kernels.multiply(
                x.reshape(-1, columns),
                weight,
                bias,
                y.view(-1, out),
                self._tables[name],
                self._bitmaps,
                self._strengths,
            )
        else:
            y = F.linear(x, weight, bias)
        if name in self.frame.listed:
            rows = x.reshape(-1, columns), y.view(-1, out)
            self._kernels.subtract(*rows, self._tables[name], self._listed, self._strengths)
        return y


class SlotRoute(Route):
    """A route over slots for an ordinary pass, laid out when the first masked Linear shows how many rows there are."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        super().__init__(spans)
        self._device = device
        self._slots: Slots | None = None

    def multiply(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The outputs [..., out] of a Linear for inputs [..., in], as the rows' masks would have them."""
        if not self.masks(name) or not x.numel():
            return F.linear(x, weight, bias)
        rows = x.shape[:-1].numel()
        if self._slots is None or self._slots.frame.rows != rows:
            slot_map = SlotMap.of(self.spans, rows)
            self._slots = Slots(slot_map.frame(), self._device)
            self._slots.write(slot_map)
        return self._slots.multiply(name, x, weight, bias)


@lru_cache(maxsize=256)
def _unite(sets: frozenset[frozenset[str]]) -> tuple[str, ...]:
    return tuple(sorted(frozenset().union(*sets)))


@lru_cache(maxsize=256)
def _places(names: tuple[str, ...], among: tuple[str, ...]) -> NDArray[np.intp]:
    number = {name: place for place, name in enumerate(among)}
    return np.array([number[name] for name in names], np.intp)


def _pad(array: NDArray[Any], count: int, with_: int) -> NDArray[Any]:
    padded = np.full((count, *array.shape[1:]), with_, array.dtype)
    padded[: len(array)] = array
    return padded
