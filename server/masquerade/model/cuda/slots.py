"""Spans as slots, strengths, tiles and a table of addresses, and the kernel launches that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from masquerade.kernels.cuda import FIELDS, CudaBits, CudaList, Tiles, find_kernels, tile
from masquerade.model.cuda.merged import find_group
from masquerade.model.cuda.staging import Layout, Staging
from masquerade.model.route import ResidentMask, Route, Span

MANY = 8  # rows of one mask from which wide tiles are used
_LISTED_WIDTHS = (1, 32)  # rows of a tile, for few and for many rows of a mask
_BITMAP_WIDTHS = (16, 64)


@dataclass(frozen=True)
class TableEntries:
    """A mask's entries in the tables of its Linears."""

    names: tuple[str, ...]  # of the mask's Linears, sorted
    addresses: NDArray[np.int64]  # [names, FIELDS]
    listed: frozenset[str]  # Linears with a list
    bitmaps: frozenset[str]  # Linears with a bitmap


_ENTRIES: WeakKeyDictionary[ResidentMask, TableEntries | None] = WeakKeyDictionary()


def find_entries(mask: ResidentMask) -> TableEntries | None:
    """The table entries of a mask, or None if a correction is not the CUDA kernels'. Cached."""
    if mask not in _ENTRIES:
        corrections: list[tuple[str, Any]] = sorted(mask.corrections.items(), key=lambda item: item[0])
        fits = corrections and all(isinstance(each, (CudaBits, CudaList)) for _, each in corrections)
        _ENTRIES[mask] = _make_entries(corrections) if fits else None
    return _ENTRIES[mask]


def _make_entries(corrections: list[tuple[str, CudaBits | CudaList]]) -> TableEntries:
    return TableEntries(
        tuple(name for name, _ in corrections),
        np.stack([each.addresses for _, each in corrections]),
        frozenset(name for name, each in corrections if isinstance(each, CudaList)),
        frozenset(name for name, each in corrections if isinstance(each, CudaBits)),
    )


@dataclass(frozen=True)
class SlotShape:
    """Sizes and Linears of a batch. Batches of equal shape can use the same tensors and the same CUDA graph."""

    rows: int
    slots: int
    listed: tuple[str, ...]  # Linears with a list in some mask
    bitmaps: tuple[str, ...]  # Linears with a bitmap in some mask
    listed_tiles: tuple[int, int]  # count, width
    bitmap_tiles: tuple[int, int]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The masked Linears and those that are merged with them, in the table's order."""
        masked = sorted({*self.listed, *self.bitmaps})
        return tuple(dict.fromkeys(name for each in masked for name in find_group(each)))

    @property
    def layout(self) -> Layout:
        """The dtypes and shapes of a batch's tensors."""
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
    """The masks of a batch by slot, and every row's slot and strength."""

    masks: tuple[ResidentMask, ...]
    slots: NDArray[np.int32]  # [rows], -1 for the base
    strengths: NDArray[np.float32]  # 1 - gamma, [rows]

    @classmethod
    def of(cls, spans: Sequence[Span], rows: int) -> SlotMap:
        """Assign slots to the masks of a batch. Rows at gamma 1 are the base's."""
        slots, strengths = np.full(rows, -1, np.int32), np.zeros(rows, np.float32)
        by_digest: dict[str, int] = {}
        masks: list[ResidentMask] = []
        for span in spans:
            if span.applied.gamma < 1:
                mask = span.applied.mask
                slot = by_digest.setdefault(mask.digest, len(masks))
                if slot == len(masks):
                    masks.append(mask)
                slots[span.start : span.stop] = slot
                strengths[span.start : span.stop] = 1 - span.applied.gamma
        return cls(tuple(masks), slots, strengths)

    def shape(self) -> SlotShape:
        """The smallest shape that holds this batch."""
        most = int(np.bincount(self.slots[self.slots >= 0], minlength=1).max())
        widths = [pair[most >= MANY] for pair in (_LISTED_WIDTHS, _BITMAP_WIDTHS)]
        counts = [len(tile(self.slots[self.slots >= 0], widths[0])[0]), len(tile(self.slots, widths[1])[0])]
        rows, slots = len(self.slots), len(self.masks)
        return SlotShape(rows, slots, *self._kinds, (counts[0], widths[0]), (counts[1], widths[1]))

    def padded_shape(self, rows: int) -> SlotShape:
        """A shape for any decode step of up to `rows` rows whose masks have the same kinds for the same Linears."""
        return SlotShape(rows, rows, *self._kinds, (rows, _LISTED_WIDTHS[0]), (rows, _BITMAP_WIDTHS[0]))

    def fill(self, shape: SlotShape) -> dict[str, NDArray[Any]]:
        """The contents of a shape's tensors. Padding has no mask."""
        table = np.zeros((len(shape.names), shape.slots, FIELDS), np.int64)
        for slot, entries in enumerate(self._entries):
            table[_find_positions(entries.names, shape.names), slot] = entries.addresses
        arrays: dict[str, NDArray[Any]] = {"table": table, "strengths": _pad(self.strengths, shape.rows, 0)}
        slots = _pad(self.slots, shape.rows, -1)
        for kind, (count, width) in (("listed", shape.listed_tiles), ("bitmap", shape.bitmap_tiles)):
            tile_slots, rows = tile(slots, width)
            if kind == "listed":  # `subtract` needs no tiles of base rows
                tile_slots, rows = tile_slots[tile_slots >= 0], rows[tile_slots >= 0]
            arrays[f"{kind}_slots"], arrays[f"{kind}_rows"] = _pad(tile_slots, count, -1), _pad(rows, count, -1)
        return arrays

    @property
    def _entries(self) -> list[TableEntries]:
        return [entries for mask in self.masks if (entries := find_entries(mask)) is not None]

    @cached_property
    def _kinds(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The Linears with a list in some mask, and those with a bitmap."""
        listed = frozenset(entries.listed for entries in self._entries)
        return _union(listed), _union(frozenset(entries.bitmaps for entries in self._entries))


class Slots:
    """The tensors of one shape, and the launches that read them; a model takes it as a route. Not thread-safe."""

    def __init__(self, shape: SlotShape, device: torch.device) -> None:
        self.shape = shape
        self._kernels: Any = find_kernels()
        self._staging = Staging(shape.layout, device)
        tensors = self._staging.tensors
        self._strengths, self._table = tensors["strengths"], tensors["table"]
        self._places = {name: place for place, name in enumerate(shape.names)}
        self._kinds = frozenset(shape.listed), frozenset(shape.bitmaps)
        self._listed = Tiles(tensors["listed_slots"], tensors["listed_rows"])
        self._bitmaps = Tiles(tensors["bitmap_slots"], tensors["bitmap_rows"])

    def write(self, slot_map: SlotMap) -> None:
        """Switch to another batch of the same shape, whose masks must live until the next `write`."""
        self._staging.write(slot_map.fill(self.shape))

    def masks(self, name: str) -> bool:
        """Whether any row's mask prunes weights of a Linear."""
        return any(name in kind for kind in self._kinds)

    def multiply(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The masked outputs [..., out] of a Linear for inputs x [..., in]."""
        return self.multiply_merged((name,), (len(weight),), x, weight, bias)

    def multiply_merged(
        self, names: tuple[str, ...], outs: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """See `Route`. The Linears have adjacent places in the table."""
        listed, bitmaps = (not kind.isdisjoint(names) for kind in self._kinds)
        if not (listed or bitmaps):
            return F.linear(x, weight, bias)
        (out, columns), place = weight.shape, self._places[names[0]]
        table, rows = self._table[place : place + len(names)], x.reshape(-1, columns)
        if bitmaps:
            y = x.new_empty(*x.shape[:-1], out)
            self._kernels.multiply(rows, weight, bias, y.view(-1, out), outs, table, self._bitmaps, self._strengths)
        else:
            y = F.linear(x, weight, bias)
        if listed:
            self._kernels.subtract(rows, y.view(-1, out), outs, table, self._listed, self._strengths)
        return y


class SlotRoute(Route):
    """A route for the CUDA kernels. The first masked Linear on a device shows the number of rows, and then the slots
    there are made.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__(spans)
        self._slots: dict[torch.device, Slots] = {}

    def multiply(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The masked outputs [..., out] of a Linear for inputs x [..., in]."""
        return self.multiply_merged((name,), (len(weight),), x, weight, bias)

    def multiply_merged(
        self, names: tuple[str, ...], outs: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """See `Route`."""
        if not any(self.masks(name) for name in names) or not x.numel():
            return F.linear(x, weight, bias)
        rows = x.shape[:-1].numel()
        slots = self._slots.get(x.device)
        if slots is None or slots.shape.rows != rows:
            slot_map = SlotMap.of(self.spans, rows)
            slots = self._slots[x.device] = Slots(slot_map.shape(), x.device)
            slots.write(slot_map)
        return slots.multiply_merged(names, outs, x, weight, bias)


@lru_cache(maxsize=256)
def _union(sets: frozenset[frozenset[str]]) -> tuple[str, ...]:
    return tuple(sorted(frozenset().union(*sets)))


@lru_cache(maxsize=256)
def _find_positions(names: tuple[str, ...], among: tuple[str, ...]) -> NDArray[np.intp]:
    positions = {name: position for position, name in enumerate(among)}
    return np.array([positions[name] for name in names], np.intp)


def _pad(array: NDArray[Any], count: int, value: int) -> NDArray[Any]:
    padded = np.full((count, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded
