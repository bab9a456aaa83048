"""The pruned weights of one module, as a bitmap of the kept or CSR of the pruned ones.

The constructors validate columns and pad bits, so kernels need not.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from maskstore import bits, rice
from maskstore.errors import ColumnOrder, GapsCorrupt, InvalidMaskValue, PadBits, TensorShape

SIDE_LIMIT = 1 << 20
SIZE_LIMIT = 1 << 32
GAPS_LIMIT = 1 << 20  # pruned weights of a module in gaps: decoding takes 50 MB at most
Tensors = dict[str, NDArray[Any]]


def check_shape(out: int, columns: int) -> tuple[int, int]:
    """(out, in) if both are within 1..2^20 and the product within 2^32, else InvalidMaskValue."""
    if not (1 <= out <= SIDE_LIMIT and 1 <= columns <= SIDE_LIMIT and out * columns <= SIZE_LIMIT):
        raise InvalidMaskValue(f"shape {out} x {columns} is outside 1..{SIDE_LIMIT} a side, {SIZE_LIMIT} weights")
    return out, columns


@dataclass(frozen=True, eq=False)
class Bitmap:
    """keep: uint8[out, 8 * ceil(in / 64)], LSB first, 1 = kept, pad bits zero; columns = in."""

    keep: bits.Bytes
    columns: int
    kind: ClassVar[str] = "bitmap"

    def __post_init__(self) -> None:
        width = bits.stride(self.columns)
        if self.keep.dtype != bits.BYTE or self.keep.ndim != 2 or self.keep.shape[1] != width:
            raise TensorShape(f"{_describe(self.keep)}, expected uint8 [out, {width}]", tensor="keep")
        check_shape(*self.shape)
        object.__setattr__(self, "keep", _freeze(self.keep))
        row = bits.padded_row(self.keep, self.columns)
        if row is not None:
            raise PadBits(f"row {row} has a bit set beyond column {self.columns - 1}", tensor="keep")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return len(self.keep), self.columns

    @cached_property
    def pruned(self) -> int:
        """How many weights are pruned."""
        return len(self.keep) * self.columns - bits.popcount(self.keep)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.keep.nbytes

    @property
    def tensors(self) -> Tensors:
        """Suffix -> array, in the order in which they are hashed."""
        return {"keep": self.keep}

    @property
    def stored(self) -> Tensors:
        """Suffix -> array, as a file holds them."""
        return self.tensors

    def to_keep(self) -> bits.Bool:
        """bool[out, in], True where kept."""
        return bits.unpack(self.keep, self.columns)

    def to_bitmap(self) -> "Bitmap":
        """Itself."""
        return self

    def to_sparse(self) -> "Sparse":
        """The same pruned set as CSR, even where that is larger."""
        return Sparse(*bits.to_csr(~self.to_keep()), self.columns)


@dataclass(frozen=True, eq=False)
class Sparse:
    """CSR of the pruned: rows int32[out + 1], cols uint16 (uint32 above 65,536 columns), ascending; columns = in."""

    rows: bits.Rows
    cols: bits.Cols
    columns: int
    kind: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        if self.rows.dtype != bits.ROW or self.rows.ndim != 1 or self.rows.size < 2:
            raise TensorShape(f"{_describe(self.rows)}, expected int32 [out + 1]", tensor="rows")
        expected = bits.column_type(self.columns)
        if self.cols.dtype != expected or self.cols.ndim != 1:
            raise TensorShape(f"{_describe(self.cols)}, expected {expected} [pruned]", tensor="cols")
        check_shape(*self.shape)
        object.__setattr__(self, "rows", _freeze(self.rows))
        object.__setattr__(self, "cols", _freeze(self.cols))
        self._check_rows()
        self._check_columns()

    def _check_rows(self) -> None:
        if self.rows[0] != 0 or self.rows[-1] != self.cols.size:
            found = f"{self.rows[0]}..{self.rows[-1]}"
            raise ColumnOrder(f"offsets run {found}, expected 0..{self.cols.size}", tensor="rows")
        falls = np.flatnonzero(self.rows[1:] < self.rows[:-1])
        if falls.size:
            raise ColumnOrder(f"offset {falls[0] + 1} is smaller than the one before", tensor="rows")

    def _check_columns(self) -> None:
        if not self.cols.size:
            return
        largest = int(self.cols.max())
        if largest >= self.columns:
            raise ColumnOrder(f"column {largest} is out of range, the module has {self.columns}", tensor="cols")
        unsorted = self.cols[1:] <= self.cols[:-1]
        starts = self.rows[1:-1]
        unsorted[starts[(starts > 0) & (starts < self.cols.size)] - 1] = False
        if unsorted.any():
            at = int(np.argmax(unsorted)) + 1
            row = int(np.searchsorted(self.rows, at, side="right")) - 1
            pair = f"{self.cols[at - 1]} is followed by {self.cols[at]}"
            raise ColumnOrder(f"row {row} is not ascending, column {pair}", tensor="cols")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.rows.size - 1, self.columns

    @property
    def pruned(self) -> int:
        """How many weights are pruned."""
        return self.cols.size

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.rows.nbytes + self.cols.nbytes

    @property
    def tensors(self) -> Tensors:
        """Suffix -> array, in the order in which they are hashed."""
        return {"rows": self.rows, "cols": self.cols}

    @property
    def stored(self) -> Tensors:
        """Suffix -> array, as a file holds them: gaps where the format allows them, which are always smaller."""
        if not has_gaps(*self.shape, self.pruned):
            return self.tensors
        out, columns = self.shape
        return {"gaps": rice.encode(bits.join_places(self.rows, self.cols, columns), out * columns)}

    @classmethod
    def from_gaps(cls, gaps: bits.Bytes, pruned: int, out: int, columns: int) -> Self:
        """The target that a file holds as uint8[n] gaps of so many pruned weights. Raises GapsCorrupt."""
        try:
            places = rice.decode(gaps, pruned, out * columns)
        except GapsCorrupt as error:
            raise error.at(tensor="gaps") from None
        return cls(*bits.split_places(places, out, columns), columns)

    def to_keep(self) -> bits.Bool:
        """bool[out, in], True where kept."""
        return ~bits.from_csr(self.rows, self.cols, self.columns)

    def to_bitmap(self) -> Bitmap:
        """The same pruned set as a bitmap, even where that is larger."""
        return Bitmap(bits.pack(self.to_keep()), self.columns)

    def to_sparse(self) -> "Sparse":
        """Itself."""
        return self


Target = Bitmap | Sparse


def encode(pruned: NDArray[np.bool_]) -> Target:
    """bool[out, in], True where pruned -> the smaller encoding; equal sizes are a bitmap."""
    if pruned.dtype != np.bool_ or pruned.ndim != 2:
        raise TensorShape(f"{_describe(pruned)}, expected bool [out, in]")
    out, columns = check_shape(*pruned.shape)
    if is_thin(out, columns, int(np.count_nonzero(pruned))):
        return Sparse(*bits.to_csr(pruned), columns)
    return Bitmap(bits.pack(~pruned), columns)


def nothing(out: int, columns: int) -> Target:
    """A target that prunes nothing, in its smaller encoding."""
    return smaller(Sparse(np.zeros(out + 1, bits.ROW), np.zeros(0, bits.column_type(columns)), columns))


def smaller(target: Target) -> Target:
    """The same pruned set in its smaller encoding (what `encode` would have chosen)."""
    return target.to_sparse() if is_thin(*target.shape, target.pruned) else target.to_bitmap()


def choose(keep: bits.Bytes, columns: int, kept: int) -> Target:
    """The smaller encoding of a packed keep with so many bits set."""
    bitmap = Bitmap(keep, columns)
    return bitmap.to_sparse() if is_thin(*bitmap.shape, len(keep) * columns - kept) else bitmap


def is_thin(out: int, columns: int, pruned: int) -> bool:
    """Whether CSR of so many pruned weights is smaller than the bitmap."""
    sparse = 4 * (out + 1) + bits.column_type(columns).itemsize * pruned
    return sparse < out * bits.stride(columns)


def has_gaps(out: int, columns: int, pruned: int) -> bool:
    """Whether a file may hold a sparse target as gaps: it is thin and cheap to decode."""
    return pruned <= min(GAPS_LIMIT, out * columns) and is_thin(out, columns, pruned)


def _freeze(array: NDArray[Any]) -> NDArray[Any]:
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
