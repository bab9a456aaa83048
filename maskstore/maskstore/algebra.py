"""Set operations on the pruned weights of one module, in either encoding.

Every result is in its smaller encoding, so equal sets have equal bytes however they were computed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from maskstore import bits
from maskstore.errors import InvalidMaskValue, MaskMismatch
from maskstore.target import Bitmap, Sparse, Target, choose, smaller

Words = NDArray[np.uint64]
Places = bits.Places
_ROWS = 1 << 22  # weights unpacked at once by majority


def union(a: Target, b: Target) -> Target:
    """Pruned by either."""
    return _combine(a, b, _or, np.bitwise_and)


def intersection(a: Target, b: Target) -> Target:
    """Pruned by both."""
    return _combine(a, b, _and, np.bitwise_or)


def difference(a: Target, b: Target) -> Target:
    """Pruned by a and not by b."""
    return _combine(a, b, _without, _keep_without)


def complement(a: Target) -> Target:
    """Pruned where a keeps."""
    keep = ~a.to_bitmap().keep
    keep.view(bits.WORD)[:, -1] &= _last(a.columns)
    return choose(keep, a.columns, a.pruned)


def majority(targets: Sequence[Target], least: int) -> Target:
    """Pruned by at least so many of the targets."""
    first = reduce(_check, targets)
    if least <= 0:
        raise InvalidMaskValue(f"at least {least} of {len(targets)} is everything")
    sparse = [target for target in targets if isinstance(target, Sparse)]
    if len(sparse) == len(targets):
        joined: Places = np.concatenate([_places(target) for target in sparse])
        places, counts = np.unique(joined, return_counts=True)
        return smaller(_sparse(places[counts >= least], *first.shape))
    bitmaps = [target.to_bitmap().keep for target in targets]
    out, columns = first.shape
    step = max(1, _ROWS // columns)
    keep = np.empty((out, bits.stride(columns)), np.uint8)
    for row in range(0, out, step):
        slabs = (bits.unpack(bitmap[row : row + step], columns) for bitmap in bitmaps)
        kept = reduce(np.add, (slab.astype(np.uint16) for slab in slabs))
        keep[row : row + step] = bits.pack(kept > len(targets) - least)
    return smaller(Bitmap(keep, columns))


def overlap(a: Target, b: Target) -> int:
    """How many weights both prune."""
    _check(a, b)
    if isinstance(a, Bitmap) and isinstance(b, Bitmap):
        return a.shape[0] * a.columns - _count_union(a.keep, b.keep)
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        return _and(_places(a), _places(b)).size
    sparse, bitmap = (a, b.to_bitmap()) if isinstance(a, Sparse) else (b.to_sparse(), a.to_bitmap())
    rows = np.repeat(np.arange(sparse.shape[0]), np.diff(sparse.rows))
    kept = bitmap.keep[rows, sparse.cols >> 3] >> (sparse.cols & 7).astype(np.uint8) & 1
    return sparse.pruned - int(kept.sum(dtype=np.int64))


def flips(a: Target, b: Target) -> Places:
    """Ascending positions in the flattened module where two targets differ."""
    _check(a, b)
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        return _xor(_places(a), _places(b))
    differs = a.to_bitmap().keep ^ b.to_bitmap().keep
    return np.flatnonzero(bits.unpack(differs, a.columns))


def flip(target: Target, runs: Iterable[Places]) -> Target:
    """Flip the weights at ascending positions, given in runs; the encoding stays."""
    if isinstance(target, Sparse):
        places = np.concatenate([np.zeros(0, np.int64), *runs])
        return _sparse(_xor(_places(target), places), *target.shape)
    keep = target.keep.copy()
    for places in runs:
        rows, columns = np.divmod(places, target.columns)
        at = rows * keep.shape[1] + (columns >> 3)
        firsts = np.flatnonzero(np.diff(at, prepend=-1))
        values = np.uint8(1) << (columns & 7).astype(np.uint8)
        keep.reshape(-1)[at[firsts]] ^= np.bitwise_or.reduceat(values, firsts) if firsts.size else values
    return Bitmap(keep, target.columns)


def _check(a: Target, b: Target) -> Target:
    if a.shape != b.shape:
        raise MaskMismatch(f"{a.shape[0]} x {a.shape[1]} and {b.shape[0]} x {b.shape[1]} cannot be combined")
    return a


def _combine(
    a: Target,
    b: Target,
    places: Callable[[Places, Places], Places],
    words: Callable[[Words, Words, Words], object],
) -> Target:
    """Combine two sparse targets by positions, all others by 64-bit words of the kept weights."""
    _check(a, b)
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        return smaller(_sparse(places(_places(a), _places(b)), *a.shape))
    left, right = a.to_bitmap().keep, b.to_bitmap().keep
    keep = np.empty_like(left)
    one, two, out = (array.view(bits.WORD) for array in (left, right, keep))
    scratch = np.empty(bits.SLAB, np.uint8)
    kept = 0
    for slab in _slabs(out):
        words(one[slab], two[slab], out[slab])
        out[slab, -1] &= _last(a.columns)
        kept += bits.count(out[slab].reshape(-1), scratch)
    return choose(keep, a.columns, kept)


def _keep_without(a: Words, b: Words, out: Words) -> None:
    np.bitwise_not(b, out)
    np.bitwise_or(a, out, out)


def _count_union(a: bits.Bytes, b: bits.Bytes) -> int:
    one, two = (array.view(bits.WORD) for array in (a, b))
    scratch = np.empty(bits.SLAB, np.uint8)
    return sum(bits.count((one[slab] | two[slab]).reshape(-1), scratch) for slab in _slabs(one))


def _slabs(words: Words) -> Iterator[slice]:
    """Whole rows, as many as stay in cache."""
    step = bits.SLAB // words.shape[1]
    return (slice(row, row + step) for row in range(0, words.shape[0], step))


def _last(columns: int) -> np.uint64:
    """The bits of a row's last word that are columns."""
    return np.uint64((1 << 64) - 1 - bits.pad_mask(columns))


def _places(target: Sparse) -> Places:
    return bits.join_places(target.rows, target.cols, target.columns)


def _sparse(places: Places, out: int, columns: int) -> Sparse:
    return Sparse(*bits.split_places(places, out, columns), columns)


def _or(a: Places, b: Places) -> Places:
    both = np.concatenate([a, b])
    both.sort(kind="stable")  # two ascending runs: a merge
    return both[np.diff(both, prepend=-1) > 0]


def _xor(a: Places, b: Places) -> Places:
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    alone = np.ones(both.size + 1, np.bool_)
    alone[1:-1] = both[1:] != both[:-1]
    return both[alone[1:] & alone[:-1]]


def _and(a: Places, b: Places) -> Places:
    return a[_found(a, b)]


def _without(a: Places, b: Places) -> Places:
    return a[~_found(a, b)]


def _found(a: Places, b: Places) -> bits.Bool:
    """Which of a are in b."""
    if not b.size:
        return np.zeros(a.size, np.bool_)
    at = np.searchsorted(b, a)
    found: bits.Bool = b[np.minimum(at, b.size - 1)] == a
    return found
