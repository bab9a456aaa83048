"""The tensors of a module: names, dtypes, shapes and offsets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskstore import bits
from maskstore.errors import MaskTruncated, TensorOffsets, TensorSet, TensorShape

DTYPES: dict[str, "np.dtype[Any]"] = {"U8": bits.BYTE, "I32": bits.ROW, "U32": bits.WIDE, "U16": bits.NARROW}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_KINDS = {"keep": "bitmap", "rows": "sparse", "gaps": "sparse", "flips_bitmap": "bitmap", "flips_sparse": "sparse"}


@dataclass(frozen=True)
class Tensor:
    """A tensor's dtype and shape, and its first byte counted from the start of the data."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        count = self.dtype.itemsize
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True)
class Module:
    """A module as a header describes it: the weight's shape, sha256 of its target's tensors, the tensors in the file.

    These are the target's own, in hash order; or `gaps` of a sparse one; or in a delta `flips_<kind>` against the
    parent. `pruned` counts the pruned weights; None where the header does not tell (bitmaps and flips).
    """

    out: int
    columns: int
    sha256: str
    tensors: Mapping[str, Tensor]
    pruned: int | None = None

    @property
    def kind(self) -> str:
        """How the target encodes its pruned set."""
        return _KINDS[next(iter(self.tensors))]


Sets = tuple[tuple[str, ...], ...]
MASK: Sets = (("keep",), ("rows", "cols"))
GAPS: Sets = (("gaps",),)
FLIPS: Sets = (("flips_bitmap",), ("flips_sparse",))
_Expected = tuple["np.dtype[Any]", tuple[int | None, ...]]
_EXPECTED: dict[str, Callable[[int, int], _Expected]] = {
    "keep": lambda out, columns: (bits.BYTE, (out, bits.stride(columns))),
    "rows": lambda out, _: (bits.ROW, (out + 1,)),
    "cols": lambda _, columns: (bits.column_type(columns), (None,)),
    "gaps": lambda _, __: (bits.BYTE, (None,)),
    "flips_bitmap": lambda _, __: (bits.BYTE, (None,)),
    "flips_sparse": lambda _, __: (bits.BYTE, (None,)),
}


def place(outlines: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Give every tensor its offset, without gaps: keep, then 4-byte items, 2-byte items, bytes; then by module."""
    placed: dict[str, dict[str, Tensor]] = {name: dict(outlines[name]) for name in sorted(outlines)}
    every = [(_rank(suffix, tensor), name, suffix) for name in placed for suffix, tensor in placed[name].items()]
    offset = 0
    for _, name, suffix in sorted(every):
        tensor = placed[name][suffix]
        placed[name][suffix] = Tensor(tensor.dtype, tensor.shape, offset)
        offset += tensor.nbytes
    return placed


def _rank(suffix: str, tensor: Tensor) -> tuple[bool, int, str]:
    """Falling alignment (a keep has rows of 8 bytes), so that every tensor starts aligned to its own items."""
    return suffix != "keep", -tensor.dtype.itemsize, "" if suffix == "keep" else CODES[tensor.dtype]


def take(name: str, shape: tuple[int, int], sets: Sets, found: dict[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Take a module's tensors out of those found (each with its claimed end): one whole set, as the weight implies."""
    suffixes = next((each for each in sets if f"{name}.{each[0]}" in found), sets[1])
    tensors = {suffix: _take(f"{name}.{suffix}", found) for suffix in suffixes}
    for suffix, tensor in tensors.items():
        dtype, expected = _EXPECTED[suffix](*shape)
        if tensor.dtype != dtype or not _fits(tensor.shape, expected):
            got = f"{CODES[tensor.dtype]} {list(tensor.shape)}"
            wanted = f"{CODES[dtype]} {str(list(expected)).replace('None', 'any')}"
            weight = f"a weight {shape[0]} x {shape[1]}"
            raise TensorShape(f"is {got}, expected {wanted} for {weight}", tensor=f"{name}.{suffix}")
    return tensors


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(want in (None, got) for want, got in zip(expected, shape, strict=True))


def _take(name: str, found: dict[str, tuple[Tensor, int]]) -> Tensor:
    if name not in found:
        raise TensorSet("is missing", tensor=name)
    tensor, end = found.pop(name)
    if end - tensor.offset != tensor.nbytes:
        claim = f"{end - tensor.offset} bytes between its offsets"
        raise TensorOffsets(f"{claim}, {tensor.nbytes} by dtype and shape", tensor=name)
    return tensor


def order(modules: Mapping[str, Module]) -> list[tuple[Tensor, str, str]]:
    """(tensor, module, suffix) in the order of their bytes."""
    tensors = [(tensor, name, suffix) for name, module in modules.items() for suffix, tensor in module.tensors.items()]
    return sorted(tensors, key=lambda item: (item[0].offset, item[0].nbytes))


def check_offsets(modules: Mapping[str, Module], start: int, size: int) -> None:
    """Tensors follow each other without gap or overlap from byte `start` to the end of the file, each aligned."""
    if start % 8:
        raise TensorOffsets(f"data starts at byte {start}, which is no multiple of 8")
    end = 0
    for tensor, module, suffix in order(modules):
        name = f"{module}.{suffix}"
        if tensor.offset != end:
            fault = "overlaps the one before" if tensor.offset < end else "leaves a gap"
            raise TensorOffsets(f"begins at {tensor.offset} and {fault}, which ends at {end}", tensor=name)
        if tensor.offset % tensor.dtype.itemsize:
            raise TensorOffsets(f"begins at {tensor.offset}, no multiple of {tensor.dtype.itemsize}", tensor=name)
        end += tensor.nbytes
    if start + end > size:
        raise MaskTruncated(f"the file ends after {size} bytes, the tensors end at {start + end}")
    if start + end < size:
        raise TensorOffsets(f"{size - start - end} bytes follow the last tensor")
