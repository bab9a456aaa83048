"""Reads the header of a GGUF file: metadata and positions of tensors.

`gguf.GGUFReader` is not used: it makes an array of every token (2 seconds for 49 152 of them) and does not check a
damaged file. Every error is an `UnusableModel` that names the file and the key or tensor.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from masquerade.errors import UnusableModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST = 2**31 - 1  # limit of sizes in metadata
DIMENSIONS = 4  # the maximum in ggml
_ALIGNMENT = 32  # default of `general.alignment`
_STRING, _ARRAY = 8, 9
_NUMBERS: Mapping[int, np.dtype[Any]] = {
    kind: np.dtype(name)
    for kind, name in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8"))
    if name
}
_LENGTH = struct.Struct("<Q")  # of a string
_LONGEST_NAME = 1024  # characters; the specification allows 65535 bytes in a key and 64 in a tensor's name
D = TypeVar("D")
_MISSING: Any = object()


@dataclass(frozen=True)
class GgufTensor:
    """One stored tensor. `shape` has the order of numpy and torch: rows first."""

    path: Path  # of its file
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int  # in the file
    nbytes: int

    def map(self) -> NDArray[np.uint8]:
        """Its bytes, mapped as long as the array lives; pages that are mapped count as memory of the process."""
        start = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        end = self.begin + self.nbytes
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(data, np.uint8, self.nbytes, self.begin - start)


@dataclass(frozen=True)
class _Strings:
    """An array of strings, decoded on demand."""

    begin: int
    end: int
    count: int


@dataclass(frozen=True)
class GgufFile:
    """The header. The getters raise `UnusableModel` for a value that is missing or of another type."""

    path: Path  # of the metadata
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def fail(self, key: str, message: str) -> NoReturn:
        """Raise `UnusableModel` about a key or a tensor, and the file that has it."""
        path = self.tensors[key].path if key in self.tensors else self.path
        raise UnusableModel(f"{path}: {key}: {message}")

    def size(self, key: str, default: D = _MISSING, least: int = 1) -> int | D:
        """An integer from `least`."""
        value = self._find(key, default)
        if value is default or (type(value) is int and least <= value <= LARGEST):
            return value
        return self.fail(key, f"must be a whole number from {least} to {LARGEST}, not {value!r:.80}")

    def is_zero(self, key: str) -> bool:
        """Whether the value is 0."""
        value = self._find(key, _MISSING)
        return isinstance(value, int | float) and value == 0

    def number(self, key: str, default: D = _MISSING) -> float | D:
        """A positive number."""
        value = self._find(key, default)
        if value is default or (type(value) in (int, float) and isfinite(value) and value > 0):
            return value  # type: ignore[no-any-return]
        return self.fail(key, f"must be a positive number, not {value!r:.80}")

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._find(key, default)
        return value if isinstance(value, bool) else self.fail(key, f"must be true or false, not {value!r:.80}")

    def text(self, key: str, default: D = _MISSING) -> str | D:
        """A string."""
        value = self._find(key, default)
        if value is default or isinstance(value, str):
            return value
        return self.fail(key, f"must be text, not {value!r:.80}")

    def numbers(self, key: str) -> NDArray[Any]:
        """An array of numbers."""
        value = self._find(key, _MISSING)
        return value if isinstance(value, np.ndarray) else self.fail(key, f"must be numbers, not {value!r:.80}")

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        value = self._find(key, _MISSING)
        if not isinstance(value, _Strings):
            self.fail(key, f"must be strings, not {value!r:.80}")
        with _open(self.path) as mapped:
            data = mapped[value.begin : value.end]
        found, position = [], 0
        for _ in range(value.count):  # the bounds are known to hold; a vocabulary has many strings
            begin = position + _LENGTH.size
            position = begin + _LENGTH.unpack_from(data, position)[0]
            found.append(data[begin:position])
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError as error:
            self.fail(key, f"has a string that is not UTF-8: {error}")

    def token(self, key: str, count: int) -> int | None:
        """A token id below `count`, or None if the file has none."""
        value = self._find(key, None)
        if value is None or (type(value) is int and 0 <= value < count):
            return value
        return self.fail(key, f"must be a token id below {count}, not {value!r:.80}")

    def _find(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        return self.fail(key, "is missing") if value is _MISSING else value


def read_file(path: Path) -> GgufFile:
    """Read the header of a GGUF file and check that its tensors lie within the file."""
    try:
        with _open(path) as data:
            return _read(path, data)
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise UnusableModel(f"{path}: cannot be read as GGUF: {error}") from error


def _open(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(path, data)
    if (magic := data[: len(MAGIC)]) != MAGIC:
        raise UnusableModel(f"{path}: is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    cursor.skip(len(MAGIC), "the magic")
    version = cursor.integer("<I", "the version")
    if version not in VERSIONS:
        known = " or ".join(map(str, VERSIONS))
        raise UnusableModel(f"{path}: is GGUF version {version}; supported: {known} (little-endian)")
    tensors = cursor.count("the number of tensors", least=24)
    keys = cursor.count("the number of keys", least=13)
    metadata: dict[str, Any] = {}
    for number in range(keys):
        key = cursor.name(f"key {number + 1} of {keys}")
        if key in metadata:
            raise UnusableModel(f"{path}: {key}: appears twice")
        metadata[key] = cursor.value(key)
    infos = list(_tensor_infos(cursor, tensors))
    file = GgufFile(path, metadata, {})
    alignment = file.size("general.alignment", _ALIGNMENT)
    if alignment & (alignment - 1):
        file.fail("general.alignment", f"must be a power of two, not {alignment}")
    origin = -(-cursor.position // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in infos:
        if name in found:
            file.fail(name, "appears twice")
        found[name] = _locate(file, name, kind, shape, origin + offset, len(data))
    return GgufFile(path, metadata, found)


def _tensor_infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, int, tuple[int, ...], int]]:
    for number in range(count):
        name = cursor.name(f"the name of tensor {number + 1} of {count}")
        dimensions = cursor.integer("<I", name)
        if not 1 <= dimensions <= DIMENSIONS:
            raise UnusableModel(f"{cursor.path}: {name}: has {dimensions} dimensions; supported: 1 to {DIMENSIONS}")
        shape = tuple(cursor.integer("<Q", name) for _ in range(dimensions))
        kind = cursor.integer("<I", name)
        yield name, kind, shape[::-1], cursor.integer("<Q", name)


def _locate(file: GgufFile, name: str, number: int, shape: tuple[int, ...], begin: int, end: int) -> GgufTensor:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        file.fail(name, f"is of type {number}, which is unknown to this version of gguf")
    values, size = GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % values:
        file.fail(name, f"has the shape {list(shape)!s:.80}; rows of {kind.name} must be a multiple of {values}")
    nbytes = prod(shape) // values * size
    if begin + nbytes > end:
        file.fail(name, f"lies at {begin}..{begin + nbytes}, but the file has {end} bytes")
    return GgufTensor(file.path, name, kind, shape, begin, nbytes)


class _Cursor:
    """A bounded forward reader of a file."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path = path
        self.position = position
        self._data = data

    def skip(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return their position."""
        begin = self.position
        if count > len(self._data) - begin:
            raise UnusableModel(
                f"{self.path}: {what}: takes {count} bytes at {begin}, but the file has {len(self._data)} bytes"
            )
        self.position += count
        return begin

    def integer(self, form: str, what: str) -> int:
        begin = self.skip(struct.calcsize(form), what)
        return int(struct.unpack_from(form, self._data, begin)[0])

    def count(self, what: str, least: int) -> int:
        """The number of the following items, of at least `least` bytes each."""
        count = self.integer("<Q", what)
        if count * least > len(self._data) - self.position:
            raise UnusableModel(f"{self.path}: {what}: {count} do not fit into a file of {len(self._data)} bytes")
        return count

    def text(self, what: str) -> str:
        length = self.integer("<Q", what)
        begin = self.skip(length, what)
        try:
            return self._data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise UnusableModel(f"{self.path}: {what!r:.80}: is not UTF-8: {error}") from error

    def name(self, what: str) -> str:
        """The name of a key or a tensor, which messages about it begin with."""
        name = self.text(what)
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise UnusableModel(
                f"{self.path}: {what}: is {name!r:.80}; expected at most {_LONGEST_NAME} printable characters"
            )
        return name

    def value(self, key: str) -> Any:
        kind = self.integer("<I", key)
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        return _plain(self._numbers(key, kind, 1)[0])

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray[Any, Any]:
        if kind == _ARRAY:
            raise UnusableModel(f"{self.path}: {key}: is an array of arrays, which is not supported")
        if kind not in _NUMBERS:
            raise UnusableModel(f"{self.path}: {key}: is of type {kind}, which GGUF does not define")
        size = count * _NUMBERS[kind].itemsize
        begin = self.skip(size, key)
        return np.frombuffer(self._data[begin : begin + size], _NUMBERS[kind])

    def _array(self, key: str) -> Any:
        kind = self.integer("<I", key)
        if kind != _STRING:
            return self._numbers(key, kind, self.integer("<Q", key))
        count = self.count(key, least=8)
        begin = position = self.position
        try:
            for _ in range(count):  # a vocabulary may be large: only find its end
                position += _LENGTH.size + _LENGTH.unpack_from(self._data, position)[0]
        except (struct.error, OverflowError):
            position = len(self._data) + 1
        self.skip(position - begin, key)
        return _Strings(begin, position, count)


def _plain(value: Any) -> Any:
    """A Python number; for a float32 the shortest that rounds to it: 1e-05 as in the config, not 9.99999975e-06."""
    return float(str(value)) if isinstance(value, np.float32) else value.item()
