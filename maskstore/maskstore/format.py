"""Reading and writing mask files, whole or module by module."""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from maskstore import bits, files, layout
from maskstore import header as headers
from maskstore.errors import DigestMismatch, MaskError, MaskExists, MaskMismatch, MaskNotFound
from maskstore.header import Header
from maskstore.layout import Module, Tensor
from maskstore.mask import BaseRef, Mask, MaskInfo, identify, leaf
from maskstore.names import check_module
from maskstore.target import Bitmap, Sparse, Target

Arrays = Mapping[str, NDArray[Any]]
_KINDS: dict[tuple[str, ...], Callable[..., Target]] = {("keep",): Bitmap, ("rows", "cols"): Sparse}


def read_mask(
    path: str | os.PathLike[str], base: str | None = None, verify: bool = True, lenient: bool = False
) -> Mask:
    """The mask in a file, mapped into memory, or a MaskError that names the fault and where it is.

    `base` is the required fingerprint. `verify=False` skips the digests (of a file verified before); shapes, columns
    and pad bits are checked all the same. `lenient` is that of `header.decode`.
    """
    with MaskReader(path, base, verify, lenient) as reader:
        return reader.mask()


def write_mask(mask: Mask, path: str | os.PathLike[str]) -> None:
    """Write a mask file atomically: a reader sees the old one or the whole new one, also after a crash."""
    write_file(Path(path), mask, {name: target.stored for name, target in mask.targets.items()})


def write_file(path: Path, mask: Mask, arrays: Mapping[str, Arrays], parent: str | None = None) -> None:
    """Write a mask, or its delta against a parent's digest, from the tensors that are to hold each module."""
    placed = layout.place({name: _outline(tensors) for name, tensors in arrays.items()})
    modules = {name: _module(mask.targets[name], mask.leaves[name], placed[name]) for name in placed}
    with files.replacing(path) as file:
        file.write(headers.encode(Header(mask.base, mask.info, mask.digest, modules, mask.signature, parent)))
        for _, name, suffix in layout.order(modules):
            array = arrays[name][suffix]
            file.write(array.data if array.size else b"")


def read_header(file: int, size: int, lenient: bool = False) -> Header:
    """The header of an open file of `size` bytes; `lenient` is that of `header.decode`."""
    length = headers.check_length(os.pread(file, headers.PREFIX + 1, 0), size)
    return headers.decode(os.pread(file, length, headers.PREFIX), size, lenient)


class MaskReader:
    """An open mask file: its header is read at once, its modules one at a time, each verified before it is returned.

    A target owns its mapped pages or its decoded arrays, so iterating over a large mask takes the memory of one module.
    `lenient` is that of `header.decode`.
    """

    def __init__(
        self, path: str | os.PathLike[str], base: str | None = None, verify: bool = True, lenient: bool = False
    ) -> None:
        self.path = Path(path)
        self.verify = verify
        self._buffer = memoryview(bytearray(files.CHUNK))
        with ExitStack() as stack:
            try:
                self._file, self.size = stack.enter_context(files.opened(self.path))
                self.header = read_header(self._file, self.size, lenient)
                self._check_kind()
                self._check_base(base)
                self._check_identity()
            except MaskError as error:
                raise error.at(path=self.path) from None
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def base(self) -> BaseRef:
        """The model it is for."""
        return self.header.base

    @property
    def info(self) -> MaskInfo:
        """Its metadata."""
        return self.header.info

    @property
    def digest(self) -> str:
        """The identity its header records; it holds for the tensors once they are verified."""
        return self.header.digest

    @property
    def signature(self) -> str | None:
        """What its header records; nothing is verified here."""
        return self.header.signature

    @property
    def names(self) -> tuple[str, ...]:
        """The modules, sorted."""
        return tuple(self.header.modules)

    def __getitem__(self, name: str) -> Target:
        if name not in self.header.modules:
            raise MaskNotFound("no such module", path=self.path, tensor=name)
        try:
            return self._target(name, self.header.modules[name])
        except MaskError as error:
            raise error.at(path=self.path) from None

    def __iter__(self) -> Iterator[tuple[str, Target]]:
        return ((name, self[name]) for name in self.names)

    def check(self) -> None:
        """Verify every module and keep none."""
        for name in self.names:
            self[name]

    def mask(self) -> Mask:
        """The whole mask, verified: gaps decoded into memory, all else in one mapping."""
        try:
            data = mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ)
            targets = {name: self._open(name, module, data) for name, module in self.header.modules.items()}
        except MaskError as error:
            raise error.at(path=self.path) from None
        return self._known(targets)

    def _open(self, name: str, module: Module, data: mmap.mmap) -> Target:
        if "gaps" in module.tensors:
            return self._decode(name, module)
        self._verify(name, module)
        start = self.header.start
        return _target(name, module, [_view(data, start + each.offset, each) for each in module.tensors.values()])

    def _known(self, targets: Mapping[str, Target]) -> Mask:
        leaves = {name: module.sha256 for name, module in self.header.modules.items()}
        return Mask.known(self.base, targets, self.info, self.header.signature, leaves)

    def _target(self, name: str, module: Module) -> Target:
        if "gaps" in module.tensors:
            return self._decode(name, module)
        self._verify(name, module)
        return _target(name, module, [self._map(tensor) for tensor in module.tensors.values()])

    def _check_kind(self) -> None:
        if self.header.parent:
            raise MaskMismatch(f"is a delta against the mask {self.header.parent[:16]}, which it needs to be opened")

    def _check_base(self, expected: str | None) -> None:
        if expected is not None and self.base.fingerprint != expected:
            found = f"{self.base.fingerprint[:16]} ({self.base.name})"
            raise MaskMismatch(f"is for the base {found}, the base here is {expected[:16]}")

    def _check_identity(self) -> None:
        computed = identity(self.base, self.header.modules)
        if computed != self.digest:
            raise DigestMismatch(f"recorded digest {self.digest[:16]}, the modules make {computed[:16]}")

    def _verify(self, name: str, module: Module) -> None:
        if not self.verify:
            return
        state = hashlib.sha256()
        for tensor in module.tensors.values():
            for chunk in files.chunks(self._file, self.header.start + tensor.offset, tensor.nbytes, self._buffer):
                state.update(chunk)
        if state.hexdigest() != module.sha256:
            raise _damaged(module.sha256, state.hexdigest(), f"{name}.{'+'.join(module.tensors)}")

    def _decode(self, name: str, module: Module) -> Sparse:
        """A sparse target from its gaps. The sha256 is that of its rows and columns, so it follows the decoding."""
        gaps, pruned = self._read(module.tensors["gaps"]), module.pruned or 0
        try:
            target = Sparse.from_gaps(gaps, pruned, module.out, module.columns)
        except MaskError as error:
            raise _named(error, name) from None
        if self.verify and (computed := leaf(target)) != module.sha256:
            raise _damaged(module.sha256, computed, f"{name}.gaps")
        return target

    def _read(self, tensor: Tensor) -> bits.Bytes:
        array, done = np.empty(tensor.nbytes, np.uint8), 0
        for chunk in files.chunks(self._file, self.header.start + tensor.offset, tensor.nbytes, self._buffer):
            array[done : done + len(chunk)] = chunk
            done += len(chunk)
        return array

    def _map(self, tensor: Tensor) -> NDArray[Any]:
        begin = self.header.start + tensor.offset
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        length = begin - page + tensor.nbytes
        data = mmap.mmap(self._file, length, access=mmap.ACCESS_READ, offset=page) if tensor.nbytes else None
        return _view(data, begin - page, tensor)


class MaskWriter:
    """Writes a mask file module by module, in any order, in the memory of one module.

    The file appears when the block ends; an exception leaves no file. `digest` is set afterwards.
    """

    def __init__(self, path: str | os.PathLike[str], base: BaseRef, info: MaskInfo) -> None:
        self.path = Path(path)
        self.base = base
        self.info = info
        self.digest = ""
        self._modules: dict[str, Module] = {}  # offsets are those of the spool until the end
        self._spool: BinaryIO

    def add(self, name: str, target: Target) -> None:
        """Append a module. MaskExists if it was added before."""
        if check_module(name) in self._modules:
            raise MaskExists("was added before", path=self.path, tensor=name)
        tensors = {}
        for suffix, array in target.stored.items():
            tensors[suffix] = Tensor(array.dtype, array.shape, self._spool.tell())
            self._spool.write(array.data if array.size else b"")
        self._modules[name] = _module(target, leaf(target), tensors)

    def __enter__(self) -> Self:
        self._spool = tempfile.TemporaryFile(dir=self.path.parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._spool:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        self._spool.flush()
        spooled = self._modules
        placed = layout.place({name: module.tensors for name, module in spooled.items()})
        modules = {name: replace(spooled[name], tensors=tensors) for name, tensors in placed.items()}
        self.digest = identity(self.base, modules)
        buffer = memoryview(bytearray(files.CHUNK))
        with files.replacing(self.path) as file:
            file.write(headers.encode(Header(self.base, self.info, self.digest, modules)))
            for tensor, name, suffix in layout.order(modules):
                offset = spooled[name].tensors[suffix].offset
                for chunk in files.chunks(self._spool.fileno(), offset, tensor.nbytes, buffer):
                    file.write(chunk)


def identity(base: BaseRef, modules: Mapping[str, Module]) -> str:
    """The digest of a header's base and modules."""
    lines = {name: (module.kind, module.out, module.columns, module.sha256) for name, module in modules.items()}
    return identify(base.fingerprint, lines)


def _module(target: Target, sha256: str, tensors: Mapping[str, Tensor]) -> Module:
    pruned = target.pruned if isinstance(target, Sparse) else None
    return Module(*target.shape, sha256, tensors, pruned)


def _outline(arrays: Arrays) -> dict[str, Tensor]:
    return {suffix: Tensor(array.dtype, array.shape) for suffix, array in arrays.items()}


def _target(name: str, module: Module, arrays: list[NDArray[Any]]) -> Target:
    try:
        return _KINDS[tuple(module.tensors)](*arrays, module.columns)
    except MaskError as error:
        raise _named(error, name) from None


def _named(error: MaskError, name: str) -> MaskError:
    """The error with its tensor's full name: a target knows the suffix only."""
    error.tensor = f"{name}.{error.tensor}" if error.tensor else name
    return error


def _damaged(recorded: str, computed: str, tensor: str) -> DigestMismatch:
    found = f"recorded sha256 {recorded[:16]}, computed {computed[:16]}"
    return DigestMismatch(f"{found}: the bytes are damaged", tensor=tensor)


def _view(data: mmap.mmap | None, begin: int, tensor: Tensor) -> NDArray[Any]:
    if data is None or not tensor.nbytes:
        return np.empty(tensor.shape, tensor.dtype)
    return np.ndarray(tensor.shape, tensor.dtype, buffer=data, offset=begin)
