"""The fingerprint of a base model, from its tensors' names, types, shapes and samples of their bytes.

Of a large tensor it reads sixteen windows, so that eight billion weights take a second. It tells models apart; it does
not prove that no weight was changed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from maskstore import strictjson
from maskstore.errors import HeaderCorrupt, MaskNotFound, MaskTruncated, TensorSet

DOMAIN = b"masquerade-base/1\n"
WHOLE = 64 << 10
WINDOW = 4 << 10
WINDOWS = 16
HEADER_LIMIT = 100 << 20  # the limit of safetensors itself; masks have a lower one, because they are not trusted


class BaseTensor(Protocol):
    """A tensor of a base model as safetensors stores it; the file may have another format."""

    @property
    def name(self) -> str:
        """Its name in transformers."""

    @property
    def dtype(self) -> str:
        """The type of its values, as safetensors writes it: `BF16`."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes, the slowest first."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""

    def read(self, spans: Sequence[tuple[int, int]]) -> bytes:
        """Some of those bytes: from the begin to the end of each span, one after the other."""


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: list[int]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def read(self, spans: Sequence[tuple[int, int]]) -> bytes:
        with open(self.file, "rb", buffering=0) as file:
            return b"".join(os.pread(file.fileno(), end - begin, self.begin + begin) for begin, end in spans)


def fingerprint(folder: str | Path) -> str:
    """64 hex digits: the same however the tensors are sharded, others for other names, dtypes, shapes or weights."""
    return fingerprint_tensors(list_tensors(folder))


def list_tensors(folder: str | Path) -> Sequence[BaseTensor]:
    """The tensors of a folder's safetensors files by name, from their headers; no value is read.

    Raises MaskNotFound if files are missing, and another MaskError if a header is damaged or a file too short.
    """
    folder = Path(folder)
    entries = sorted((entry for file in _files(folder) for entry in _entries(file)), key=lambda entry: entry.name)
    for before, entry in pairwise(entries):
        if before.name == entry.name:
            raise TensorSet(f"is in {before.file.name} and in {entry.file.name}", path=folder, tensor=entry.name)
    return entries


def fingerprint_tensors(tensors: Iterable[BaseTensor]) -> str:
    """The fingerprint of a checkpoint that has these tensors, in any order; their names differ."""
    state = hashlib.sha256(DOMAIN)
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        state.update(f"{strictjson.dump([tensor.name, tensor.dtype, list(tensor.shape)])}\n".encode())
        state.update(tensor.read(list(_windows(tensor.nbytes))))
    return state.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The shards the index names, else model.safetensors, else every *.safetensors of the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _shards(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise MaskNotFound(
                f"the index names {len(missing)} files that are not there, first {missing[0]}", path=index
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise MaskNotFound("holds no *.safetensors, so there is no base model to identify", path=folder)
    return files


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderCorrupt(f"is not an index of shards: {error!r:.120}", path=index) from None
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange or not names:
        raise HeaderCorrupt(f"names no plain files: {strange!r:.120}", path=index)
    return names


def _entries(path: Path) -> Iterator[_Entry]:
    """The tensors of one safetensors file, with absolute offsets."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT:
            raise HeaderCorrupt(f"the header claims {length} bytes, the limit is {HEADER_LIMIT}", path=path)
        if 8 + length > size:
            raise MaskTruncated(f"the file ends after {size} bytes, inside a header of {length}", path=path)
        raw = file.read(length)
    try:
        document = json.loads(raw)
        document.pop("__metadata__", None)
        for name, entry in document.items():
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= begin <= end <= size:
                raise MaskTruncated(f"lies at {begin}..{end}, the file has {size} bytes", path=path, tensor=name)
            yield _Entry(name, str(entry["dtype"]), [int(side) for side in entry["shape"]], path, begin, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderCorrupt(f"is not a safetensors header: {error!r:.120}", path=path) from None


def _windows(size: int) -> Iterator[tuple[int, int]]:
    """All of a small tensor; of a large one sixteen windows from its first to its last byte, evenly spaced."""
    if size <= WHOLE:
        yield 0, size
        return
    for window in range(WINDOWS):
        start = (size - WINDOW) * window // (WINDOWS - 1)
        yield start, start + WINDOW
