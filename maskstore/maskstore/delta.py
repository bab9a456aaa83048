"""A mask stored as its difference from a parent mask, which is needed to open it; the digest stays the same."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from maskstore import algebra, bits
from maskstore.errors import DeltaCorrupt, DigestMismatch, MaskMismatch, NotAMask
from maskstore.format import Arrays, MaskReader, write_file
from maskstore.layout import Module
from maskstore.mask import Mask, leaf
from maskstore.target import Target

SKIP = 255  # a byte that flips nothing; every other byte is the distance to the next flip
_CHUNK = 1 << 20
_KINDS: dict[str, Callable[[Target], Target]] = {
    "bitmap": lambda target: target.to_bitmap(),
    "sparse": lambda target: target.to_sparse(),
}


def write_delta(mask: Mask, parent: Mask, path: str | os.PathLike[str]) -> None:
    """Write a mask as its difference from a parent, for each module where that is smaller; atomic like write_mask."""
    _check_parent(mask.base.fingerprint, parent)
    arrays = {name: _arrays(target, parent.targets.get(name)) for name, target in mask.targets.items()}
    write_file(Path(path), mask, arrays, parent.digest)


class DeltaReader(MaskReader):
    """A MaskReader of a delta; `find` gives the parent by its digest."""

    def __init__(self, path: str | os.PathLike[str], find: Callable[[str], Mask], base: str | None = None) -> None:
        super().__init__(path, base)
        self._find = find
        self._parent: Mask | None = None

    @property
    def parent(self) -> Mask:
        """The mask it is a delta against; opened on first use."""
        if self._parent is None:
            digest = self._digest_of_parent()
            self._parent = self._find(digest)
            _check_parent(self.base.fingerprint, self._parent)
            if self._parent.digest != digest:
                raise DigestMismatch(f"parent {digest[:16]} is wanted, {self._parent.digest[:16]} was given")
        return self._parent

    def mask(self) -> Mask:
        """The whole mask, in memory. The parent is required even if no module needs it."""
        _check_parent(self.base.fingerprint, self.parent)
        return self._known(dict(self))

    def _check_kind(self) -> None:
        self._digest_of_parent()

    def _digest_of_parent(self) -> str:
        if self.header.parent is None:
            raise NotAMask("is a whole mask, not a delta", path=self.path)
        return self.header.parent

    def _target(self, name: str, module: Module) -> Target:
        suffix, *_ = module.tensors
        if not suffix.startswith("flips"):
            return super()._target(name, module)
        before = self.parent.targets.get(name)
        if before is None or before.shape != (module.out, module.columns):
            shape = f"{module.out} x {module.columns}"
            raise MaskMismatch(f"the parent has no such module of {shape}", tensor=name)
        stream: bits.Bytes = self._map(module.tensors[suffix])
        try:
            target = _KINDS[module.kind](algebra.flip(before, _decode(stream, module)))
        except DeltaCorrupt as error:
            raise error.at(tensor=f"{name}.{suffix}") from None
        computed = leaf(target)
        if computed != module.sha256:
            found = f"recorded sha256 {module.sha256[:16]}, computed {computed[:16]}"
            raise DigestMismatch(f"{found}: the delta or its parent is damaged", tensor=f"{name}.{suffix}")
        return target


def _check_parent(fingerprint: str, parent: Mask) -> None:
    if parent.base.fingerprint != fingerprint:
        pair = f"{fingerprint[:16]} and {parent.base.fingerprint[:16]}"
        raise MaskMismatch(f"a delta and its parent are of different bases: {pair}")


def _arrays(target: Target, before: Target | None) -> Arrays:
    """The smaller of the target and its flips; equal sizes are the target."""
    if before is None or before.shape != target.shape:
        return target.stored
    stream, stored = encode_flips(algebra.flips(before, target)), target.stored
    size = sum(array.nbytes for array in stored.values())
    fits = stream.size < size and stream.size <= _limit(*target.shape)
    return {f"flips_{target.kind}": stream} if fits else stored


def encode_flips(places: bits.Places) -> bits.Bytes:
    """Ascending positions -> one byte each, plus one for every 255 positions skipped."""
    skips, rest = np.divmod(np.diff(places, prepend=-1) - 1, SKIP)
    stream = np.full(places.size + int(skips.sum()), SKIP, np.uint8)
    stream[np.cumsum(skips + 1) - 1] = rest
    return stream


def decode_flips(stream: bits.Bytes, size: int) -> Iterator[bits.Places]:
    """The positions, in runs; DeltaCorrupt when one is not below `size` or the last byte skips."""
    if stream.size and stream[-1] == SKIP:
        raise DeltaCorrupt("the last byte skips and flips nothing")
    place = -1
    for start in range(0, stream.size, _CHUNK):
        chunk = stream[start : start + _CHUNK]
        flips = chunk != SKIP
        places = place + np.cumsum(chunk + flips, dtype=np.int64)
        place = int(places[-1])
        if place >= size:
            raise DeltaCorrupt(f"a flip at weight {place}, the module has {size}")
        yield places[flips]


def _decode(stream: bits.Bytes, module: Module) -> Iterator[bits.Places]:
    limit = _limit(module.out, module.columns)
    if stream.size > limit:
        raise DeltaCorrupt(f"{stream.size} bytes of flips, the module itself would take {limit} at most")
    return decode_flips(stream, module.out * module.columns)


def _limit(out: int, columns: int) -> int:
    """Bytes of flips a module may have: those of its bitmap, so that decoding costs what the module costs."""
    return out * bits.stride(columns)
