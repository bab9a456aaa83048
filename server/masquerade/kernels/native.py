"""The masked product on a CPU, in C++: weights are read once for all rows of a batch, whatever each of them wears.

Knows how a call of the compiled library is laid out (`cpp/product.h`), and when the library can take a Linear. Refuses
to know about requests and routes. Every row's result is the same, bit for bit, whoever shares the batch and however
many threads there are; what a hard mask prunes never counts, even if it is not a number.

A mask is laid out once, as `NativeParts`, and a batch once for all Linears, as a `NativeProduct`. So a batch that wears
something else than the last one costs nothing in any Linear.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from maskstore import Target
from masquerade.errors import UnusableModel
from masquerade.kernels.correction import accumulator

_log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("libmasquerade.so")
INTERFACE = 4  # of product.h
ISAS = ("portable", "avx2", "avx512", "avx512bf16")  # from the slowest to the fastest, numbered as in product.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LIST, _WIDE_LIST, _BITMAP = range(1, 4)
_PART = np.dtype([("kind", np.int64), ("data", np.uintp)])
_SPAN = "Pdqq"  # address of the parts, strength, start, stop
Record = tuple[int, int]  # kind and address, as a table of parts has them


class Library:
    """The compiled library; raises `OSError` if there is none, or one of other sources."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))  # torch is imported: both use its OpenMP
        if not hasattr(library, "masquerade_interface") or library.masquerade_interface() != INTERFACE:
            raise OSError(f"{path} was built from other sources; install again")
        self.multiply = library.masquerade_product
        self.multiply.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),  # spans, their count, number of the Linear
            *(ctypes.c_void_p,) * 4,  # weight, bias, x, y
            *(ctypes.c_int64,) * 3,  # rows, out, in
            *(ctypes.c_int32,) * 3,  # dtype, isa, threads
        )
        kind_and_dtype, address, number = (ctypes.c_int64, ctypes.c_int32), ctypes.c_void_p, ctypes.c_int64
        self.measure_list = library.masquerade_list_size
        self.measure_list.argtypes = (*kind_and_dtype, number, number)  # out, pruned
        self.measure_list.restype = ctypes.c_int64
        self.write_list = library.masquerade_list_write
        self.write_list.argtypes = (*kind_and_dtype, address, address, address, number, number, address)
        self.write_list.restype = None
        self.read_list = library.masquerade_list_read
        self.read_list.argtypes = (*kind_and_dtype, address, number, address, address)
        self.read_list.restype = None
        found = library.masquerade_isas()
        self.isas = [name for number, name in enumerate(ISAS) if found >> number & 1]
        self.fastest = ISAS.index(self.isas[-1])


@cache
def find_library() -> Library | None:
    """The library, or None where it was not built; which of the two is logged, once."""
    try:
        library = Library(LIBRARY)
    except OSError as error:
        _log.warning("masked products run on torch, which is slower: no native kernels (%s)", error)
        return None
    _log.info("masked products run on native kernels (%s)", library.isas[-1])
    return library


def _library() -> Library:
    if (library := find_library()) is None:
        raise UnusableModel("the native kernels were not built; is there a C++ compiler?")
    return library


def serves(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the library can compute a module: a plain Linear on the CPU, of fp32 or bf16."""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module.weight.dtype not in _DTYPES:
        return False
    return module.weight.is_contiguous() and find_library() is not None


class NativeMask(ABC):
    """What a mask prunes of one Linear, as the kernels read it: bytes of a kind."""

    def __init__(self, linear: nn.Linear, pruned: int, kind: int, data: NDArray[np.uint8]) -> None:
        self._linear = linear  # its weight is shared with the base
        self._kind, self._data = kind, data
        self.shape = (linear.out_features, linear.in_features)
        self.pruned = pruned  # how many weights are

    @property
    def nbytes(self) -> int:
        """Bytes held beside the base's weights."""
        return self._data.nbytes

    @property
    def record(self) -> Record:
        """What a call says of this mask; valid for as long as the mask lives."""
        return self._kind, self._data.ctypes.data

    @abstractmethod
    def to_keep(self) -> NDArray[np.bool_]:
        """Where weights are kept, [out, in]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows [n, in] to [n, out], in torch: for who wants what is pruned by itself, or a gradient."""
        dtype = accumulator(x.dtype)
        kept = torch.from_numpy(self.to_keep()).to(x.device)
        return F.linear(x.to(dtype), self._linear.weight.to(dtype).masked_fill(kept, 0))


class NativeBits(NativeMask):
    """A mask as one bit a weight: the target's own."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        self._bitmap = target.to_bitmap()
        super().__init__(linear, target.pruned, _BITMAP, self._bitmap.keep)

    @staticmethod
    def footprint(linear: nn.Linear, _: int) -> int:
        """What `nbytes` will be, whatever is pruned."""
        return linear.out_features * 8 * -(-linear.in_features // 64)

    def to_keep(self) -> NDArray[np.bool_]:
        """Where weights are kept, [out, in]."""
        return self._bitmap.to_keep()


class NativeList(NativeMask):
    """A mask as a list of the columns that are pruned, with their weights' values beside them (`cpp/list.h`)."""

    def __init__(self, linear: nn.Linear, target: Target) -> None:
        sparse, (kind, dtype, column) = target.to_sparse(), _form(linear)
        data = torch.empty(self.footprint(linear, sparse.pruned), dtype=torch.uint8).numpy()  # begins a cache line
        super().__init__(linear, sparse.pruned, kind, data)
        rows, cols, weight = sparse.rows, sparse.cols.astype(column, copy=False), linear.weight
        _library().write_list(
            kind, dtype, rows.ctypes.data, cols.ctypes.data, weight.data_ptr(), *self.shape, data.ctypes.data
        )

    @staticmethod
    def footprint(linear: nn.Linear, pruned: int) -> int:
        """What `nbytes` will be for so many pruned weights: a column and a value each, and some six bytes an output."""
        kind, dtype, _ = _form(linear)
        size: int = _library().measure_list(kind, dtype, linear.out_features, pruned)
        return size

    def to_keep(self) -> NDArray[np.bool_]:
        """Where weights are kept, [out, in]."""
        (kind, dtype, column), (out, _) = _form(self._linear), self.shape
        rows, cols = np.empty(out + 1, np.int32), np.empty(self.pruned, column)
        _library().read_list(kind, dtype, self._data.ctypes.data, out, rows.ctypes.data, cols.ctypes.data)
        keep = np.ones(self.shape, np.bool_)
        keep[np.repeat(np.arange(out), np.diff(rows)), cols] = False
        return keep


def _form(linear: nn.Linear) -> tuple[int, int, type[np.uint16 | np.uint32]]:
    """The kind, and the dtypes of values and columns, of a Linear's lists."""
    wide = linear.in_features >= 1 << 16  # a count may be as large as that
    dtype = _DTYPES[linear.weight.dtype]
    return (_WIDE_LIST, dtype, np.uint32) if wide else (_LIST, dtype, np.uint16)


class NativeParts:
    """All that a mask prunes, as a table of the model's Linears. Made once, when the mask comes to the device."""

    def __init__(self, masks: Mapping[str, NativeMask], numbers: Mapping[str, int]) -> None:
        """`numbers` are the places of all Linears in the tables of a model, by name."""
        self.numbers = numbers
        self.covered = sum(1 << numbers[name] for name in masks)  # a bit for each Linear with something pruned
        self._masks = tuple(masks.values())  # their memory is what the table points to
        self._table = np.zeros(len(numbers), _PART)
        for name, mask in masks.items():
            self._table[numbers[name]] = mask.record
        self.address = self._table.ctypes.data


class NativeSpan(NamedTuple):
    """Rows `start` to `stop` of a batch wear one mask at one strength."""

    parts: NativeParts
    strength: float  # 1 - gamma
    start: int
    stop: int


class NativeProduct:
    """The product of any Linear of a model for one batch: y = x (W * (M + gamma (1 - M)))ᵀ + b, row by row.

    Rows that wear nothing are the base's. `isa` is a name of `ISAS`, by default the fastest that this processor has.
    Safe for several threads.
    """

    def __init__(self, worn: Sequence[NativeSpan] = (), isa: str | None = None) -> None:
        library = _library()
        self._multiply = library.multiply
        self._isa = ISAS.index(isa) if isa else library.fastest
        self._held = [one.parts for one in worn]  # their tables are what the spans point to
        self._numbers = self._held[0].numbers if worn else {}
        self._covered = 0
        for parts in self._held:
            self._covered |= parts.covered
        spans = [(parts.address, strength, start, stop) for parts, strength, start, stop in worn]
        spans.sort()
        self._spans = struct.pack(_SPAN * len(spans), *chain.from_iterable(spans))  # who wears the same is together

    def find(self, name: str) -> int | None:
        """The number of a Linear, if anybody's mask prunes something of it."""
        number = self._numbers.get(name)
        return number if number is not None and self._covered >> number & 1 else None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, number: int | None = None) -> Tensor:
        """Map rows [..., in] to [..., out] in the weight's dtype, by the masks' parts of a number; without one all rows
        are the base's.

        Raises `ValueError` if x has another width or dtype than the weight, fewer rows than wear something, or a row
        that wears two masks.
        """
        x, shape, (out, columns) = x.contiguous(), x.shape, weight.shape
        if shape[-1] != columns or x.dtype != weight.dtype:
            raise ValueError(f"{tuple(shape)} of {x.dtype} cannot go through {tuple(weight.shape)} of {weight.dtype}")
        y = x.new_empty(*shape[:-1], out)
        rows = x.numel() // columns
        wrong = self._multiply(
            self._spans,
            0 if number is None else len(self._held),
            number or 0,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            rows,
            out,
            columns,
            _DTYPES[x.dtype],
            self._isa,
            torch.get_num_threads(),
        )
        if wrong:
            raise ValueError(f"{rows} rows cannot wear {list(struct.iter_unpack(_SPAN, self._spans))}")
        return y


@cache
def _bare() -> NativeProduct:
    return NativeProduct()


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with the weights as they are: fp32 by torch, to the bit; bf16, which torch is slow at, natively."""
    natively = x.dtype is torch.bfloat16 and not x.is_cuda
    return _bare()(x, weight, bias) if natively else F.linear(x, weight, bias)
