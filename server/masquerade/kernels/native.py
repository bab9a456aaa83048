"""The masked product on a CPU, in C++: one pass over the weights for all rows of a batch, whatever their masks.

A row's result is bit-identical for every composition of the batch and every number of threads. A hard mask skips
pruned weights even if they are not finite. `NativeParts` lays out a mask once, and `NativeProduct` a batch once for all
Linears, so a change of masks costs nothing per Linear. `cpp/product.h` defines the library's interface.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from maskstore import Target
from masquerade.errors import UnusableModel
from masquerade.kernels.correction import accumulator, bitmap_footprint

_log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libmasquerade.so")
INTERFACE = 12  # of product.h
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # slowest first, numbered as in product.h
ROUNDS = 16  # added to a form
NO_MEMORY = 3  # an outcome
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LIST, _WIDE_LIST, _BITMAP = range(1, 4)
_PART = np.dtype([("kind", np.int64), ("data", np.uintp)])
_SPAN = "Pdqq"  # address of the parts, strength, start, stop
Record = tuple[int, int]  # kind and address: an entry of a table of parts


class Library:
    """The compiled library. Raises `OSError` if it is missing or was built from other sources."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))  # after torch, whose OpenMP runtime both use
        if not hasattr(library, "masquerade_interface") or library.masquerade_interface() != INTERFACE:
            raise OSError(f"{path} was built from other sources; install the package again")
        self.multiply = library.masquerade_product
        self.multiply.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),  # spans, their count, index of the Linear
            *(ctypes.c_void_p,) * 4,  # weight, bias, x, y
            *(ctypes.c_int64,) * 3,  # rows, out, in
            *(ctypes.c_int32,) * 4,  # dtype, form, isa, threads
        )
        self.attend = library.masquerade_attention
        self.attend.argtypes = (
            *(ctypes.c_void_p,) * 8,  # q, keys, values, y; blocks, starts, rows and lengths of chunks
            *(ctypes.c_int64,) * 6,  # chunks, heads, kv heads, head size, width of blocks, positions of a block
            ctypes.c_float,
            *(ctypes.c_int32,) * 3,  # dtype, isa, threads
        )
        self.run_layers = library.masquerade_layers
        self.run_layers.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),  # layers, index of the first, their number
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),  # step, spans, their count
            *(ctypes.c_void_p,) * 4,  # cosines, sines, x, y
            *(ctypes.c_int32,) * 2,  # isa, threads
        )
        kind_and_dtype, address, size = (ctypes.c_int64, ctypes.c_int32), ctypes.c_void_p, ctypes.c_int64
        settings, scale = (ctypes.c_int32,) * 3, ctypes.c_float  # dtype, isa, threads
        self.rows: dict[str, Callable[..., int | None]] = {}  # what `rows.py` calls
        for name, addresses, sizes in (
            ("normalize", 3, (size, size, scale)),  # x, weight, y; rows, size, epsilon
            ("normalize_back", 4, (size, size, scale)),  # x, weight, gradients of y and x
            ("rotate", 3, (size, size, size)),  # x, cosines, sines; rows, heads, size
            ("gate", 3, (size,)),  # gate, up, y
            ("gate_back", 5, (size,)),  # gate, up, gradients of y, gate and up
            ("softmax", 2, (size, size, size, size, scale)),  # scores, seen; rows, heads, queries, positions
            ("softmax_back", 2, (size, size, scale)),  # shares, their gradient; rows, positions
            ("add_products", 3, (size,)),  # a, b, sums
        ):
            self.rows[name] = function = getattr(library, f"masquerade_{name}")
            function.argtypes, function.restype = ((address,) * addresses + sizes + settings), None
        self.rows["softmax"].restype = ctypes.c_int32  # type: ignore[attr-defined]  # the only one that needs memory
        self.measure_list = library.masquerade_list_size
        self.measure_list.argtypes = (*kind_and_dtype, size, size)  # out, pruned
        self.measure_list.restype = ctypes.c_int64
        self.write_list = library.masquerade_list_write
        self.write_list.argtypes = (*kind_and_dtype, address, address, address, size, size, address)
        self.write_list.restype = None
        self.read_list = library.masquerade_list_read
        self.read_list.argtypes = (*kind_and_dtype, address, size, address, address)
        self.read_list.restype = None
        form = ctypes.c_int32
        self.measure_quantised = library.masquerade_quantised_size
        self.measure_quantised.argtypes = (form, size, size)  # out, in
        self.measure_quantised.restype = ctypes.c_int64
        self.write_quantised = library.masquerade_quantised_write
        self.write_quantised.argtypes = (form, address, size, size, size, address)  # first, count, in
        self.write_quantised.restype = None
        self.read_quantised = library.masquerade_quantised_read
        self.read_quantised.argtypes = (form, address, address, size, size, address)  # outputs, their count, in
        self.read_quantised.restype = None
        supported = library.masquerade_isas()  # bit i: ISAS[i]
        self.isas = [name for bit, name in enumerate(ISAS) if supported >> bit & 1]
        self.fastest = ISAS.index(self.isas[-1])


@cache
def find_library() -> Library | None:
    """The library, or None if it was not built; logs once which of the two applies."""
    try:
        library = Library(LIBRARY)
    except OSError as error:
        _log.warning("masked products run on torch, which is slower: no native kernels (%s)", error)
        return None
    _log.info("masked products run on native kernels (%s)", library.isas[-1])
    return library


def require_library() -> Library:
    """The library. Raises `UnusableModel` if it was not built."""
    if (library := find_library()) is None:
        raise UnusableModel("the native kernels were not built; install a C++ compiler and the package again")
    return library


def check_memory(outcome: int | None) -> None:
    """Raise `MemoryError` if a call of the library lacked memory."""
    if outcome == NO_MEMORY:
        raise MemoryError("the native kernels have no memory for this step")


def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 and the kernels use it."""
    library = find_library()
    return library is not None and ISAS[library.fastest] in ("avx512bf16", "amx")


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is a `QuantisedWeight`; one of bitsandbytes in 4 bits is uint8, too."""
    return weight.dtype is torch.uint8 and hasattr(weight, "matrix")


def serves(module: nn.Module, device: str | None = None) -> TypeGuard[nn.Linear]:
    """Whether the library supports a module: a plain fp32 or bf16 Linear on the CPU, or one of `quantised.py`.

    `device` as in `kernels.choose`.
    """
    if isinstance(module, nn.Linear) and is_quantised(module.weight):
        return True
    if type(module) is not nn.Linear or module.weight.dtype not in DTYPES:
        return False
    if (device or module.weight.device.type) != "cpu":
        return False
    return module.weight.is_contiguous() and find_library() is not None


class NativeMask(ABC):
    """One Linear's pruned weights in a layout that the kernels read."""

    def __init__(self, linear: nn.Linear, pruned: int, kind: int, data: NDArray[np.uint8]) -> None:
        self._linear = linear  # the base's; its weight is not copied
        self._kind, self._data = kind, data
        self.shape = (linear.out_features, linear.in_features)
        self.pruned = pruned  # number of pruned weights

    @property
    def nbytes(self) -> int:
        """Bytes, without the base's weights."""
        return self._data.nbytes

    @property
    def record(self) -> Record:
        """The mask's entry in a table of parts; valid while the mask lives."""
        return self._kind, self._data.ctypes.data

    @abstractmethod
    def to_keep(self) -> NDArray[np.bool_]:
        """True where a weight is kept, [out, in]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out], in torch, with gradients."""
        dtype = accumulator(x.dtype)
        kept = torch.from_numpy(self.to_keep()).to(x.device)
        return F.linear(x.to(dtype), _read(self._linear).to(dtype).masked_fill(kept, 0))


class NativeBits(NativeMask):
    """A mask as one bit per weight, in the target's own memory."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        self._bitmap = target.to_bitmap()
        super().__init__(linear, target.pruned, _BITMAP, self._bitmap.keep)

    footprint = staticmethod(bitmap_footprint)

    def to_keep(self) -> NDArray[np.bool_]:
        """True where a weight is kept, [out, in]."""
        return self._bitmap.to_keep()


class NativeList(NativeMask):
    """A mask as a list of pruned columns and their weights' values (`cpp/list.h`)."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        sparse, (kind, dtype, column) = target.to_sparse(), _layout(linear)
        data = torch.empty(self.footprint(linear, sparse.pruned), dtype=torch.uint8).numpy()  # starts on a cache line
        super().__init__(linear, sparse.pruned, kind, data)
        rows, cols, weight = sparse.rows, sparse.cols.astype(column, copy=False), _read(linear)
        require_library().write_list(
            kind, dtype, rows.ctypes.data, cols.ctypes.data, weight.data_ptr(), *self.shape, data.ctypes.data
        )

    @staticmethod
    def footprint(linear: nn.Linear, pruned: int) -> int:
        """The `nbytes` of a list: a column and a value per pruned weight, and about six bytes per output."""
        kind, dtype, _ = _layout(linear)
        size: int = require_library().measure_list(kind, dtype, linear.out_features, pruned)
        return size

    def to_keep(self) -> NDArray[np.bool_]:
        """True where a weight is kept, [out, in]."""
        (kind, dtype, column), (out, _) = _layout(self._linear), self.shape
        rows, cols = np.empty(out + 1, np.int32), np.empty(self.pruned, column)
        require_library().read_list(kind, dtype, self._data.ctypes.data, out, rows.ctypes.data, cols.ctypes.data)
        keep = np.ones(self.shape, np.bool_)
        keep[np.repeat(np.arange(out), np.diff(rows)), cols] = False
        return keep


def _read(linear: nn.Linear) -> Tensor:
    """The weight [out, in], dequantised if it is quantised."""
    weight: Any = linear.weight
    values: Tensor = weight.read() if is_quantised(weight) else weight
    return values


def _layout(linear: nn.Linear) -> tuple[int, int, type[np.uint16 | np.uint32]]:
    """The kind, and the dtypes of values and columns, of a Linear's lists."""
    wide = linear.in_features >= 1 << 16  # an output may have as many pruned weights
    dtype = DTYPES[describe_weight(linear.weight)[1]]
    return (_WIDE_LIST, dtype, np.uint32) if wide else (_LIST, dtype, np.uint16)


class NativeParts:
    """A mask as a table with a part per Linear of the model. Made once, when the mask is loaded."""

    def __init__(self, masks: Mapping[str, NativeMask], indices: Mapping[str, int]) -> None:
        """`indices` maps the name of each Linear of the model to its place in the table."""
        self.indices = indices
        self.covered = sum(1 << indices[name] for name in masks)  # a bit per Linear with pruned weights
        self._masks = tuple(masks.values())  # keeps the memory that the table points to
        self._table = np.zeros(len(indices), _PART)
        for name, mask in masks.items():
            self._table[indices[name]] = mask.record
        self.address = self._table.ctypes.data


class NativeSpan(NamedTuple):
    """Rows `start` to `stop` of a batch have one mask at one strength."""

    parts: NativeParts
    strength: float  # 1 - gamma
    start: int
    stop: int


def describe_weight(weight: Any) -> tuple[Sequence[int], torch.dtype, int]:
    """The shape and the dtype of a weight's values, and its form in product.h."""
    if is_quantised(weight):
        return weight.matrix, torch.bfloat16, weight.form | (ROUNDS if weight.rounds else 0)
    return weight.shape, weight.dtype, 0


class NativeProduct:
    """The product of any Linear of a model for one batch: y = x (W * (M + gamma (1 - M)))ᵀ + b, row by row.

    Rows of no span are the base's. `isa` is a name in `ISAS`, by default the fastest that this processor supports.
    Thread-safe.
    """

    def __init__(self, spans: Sequence[NativeSpan] = (), isa: str | None = None) -> None:
        library = require_library()
        self._multiply = library.multiply
        self._isa = ISAS.index(isa) if isa else library.fastest
        self._parts = [span.parts for span in spans]  # keeps the tables that the packed spans point to
        self._indices = self._parts[0].indices if spans else {}
        self._covered = 0
        for parts in self._parts:
            self._covered |= parts.covered
        # Sorted, so that spans of one mask and strength follow one another.
        packed = sorted((parts.address, strength, start, stop) for parts, strength, start, stop in spans)
        self._spans = struct.pack(_SPAN * len(packed), *chain.from_iterable(packed))

    @property
    def packed(self) -> tuple[bytes, int]:
        """The spans as the library reads them, and their number; valid while the product lives."""
        return self._spans, len(self._parts)

    def find(self, name: str) -> int | None:
        """The index of a Linear in the tables, or None if no row's mask prunes weights of it."""
        index = self._indices.get(name)
        return index if index is not None and self._covered >> index & 1 else None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, index: int | None = None) -> Tensor:
        """Map rows [..., in] to [..., out] in the weight's dtype; `index` is from `find`, and None ignores all masks.

        A quantised weight has the dtype bf16. Raises `ValueError` if x has another width or dtype than the weight, if a
        span ends beyond the rows, or if spans overlap; and `MemoryError` if there is no memory.
        """
        x, shape, dtype = x.contiguous(), x.shape, x.dtype
        (out, columns), values, form = describe_weight(weight)
        if shape[-1] != columns or dtype != values:
            raise ValueError(f"inputs {tuple(shape)} of {dtype} do not fit the weight {(out, columns)} of {values}")
        y = x.new_empty(*shape[:-1], out)
        rows = x.numel() // columns
        failed = self._multiply(
            self._spans,
            0 if index is None else len(self._parts),
            index or 0,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            rows,
            out,
            columns,
            DTYPES[dtype],
            form,
            self._isa,
            torch.get_num_threads(),
        )
        check_memory(failed)
        if failed:
            spans = list(struct.iter_unpack(_SPAN, self._spans))
            raise ValueError(f"spans overlap or end beyond the {rows} rows (table, strength, start, stop): {spans}")
        return y


@cache
def _dense_product() -> NativeProduct:
    return NativeProduct()


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product without masks: by torch in fp32, natively in bf16 on a CPU, which torch is slow at."""
    return multiply_base(x, weight, bias) if x.dtype is torch.bfloat16 else F.linear(x, weight, bias)


def multiply_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a batch without masks, in any dtype: on a CPU natively, so that a row of the base has the same
    bits, and the same speed, whether or not other rows have masks.
    """
    return F.linear(x, weight, bias) if x.is_cuda else _dense_product()(x, weight, bias)
