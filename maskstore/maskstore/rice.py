"""The Rice code of the gaps between ascending positions (R. F. Rice, 1979): how a file holds a sparse target."""

import numpy as np

from maskstore import bits
from maskstore.errors import GapsCorrupt


def encode(places: bits.Places, size: int) -> bits.Bytes:
    """Ascending int64 positions below `size` -> uint8 code: remainders, then quotients (FORMAT.md, section 4)."""
    count = places.size
    if not count:
        return np.zeros(0, np.uint8)
    gaps, width = np.diff(places, prepend=-1) - 1, _width(count, size)
    ends = np.cumsum((gaps >> width) + 1)
    code = np.zeros(count * width + int(ends[-1]), np.uint8)
    remainders = code[: count * width].reshape(count, width)
    for bit in range(width):
        remainders[:, bit] = gaps >> bit & 1
    code[count * width + ends - 1] = 1
    return np.packbits(code, bitorder="little")


def decode(code: bits.Bytes, count: int, size: int) -> bits.Places:
    """`count` ascending int64 positions below `size` from their code, or GapsCorrupt."""
    _check_length(code, count, size)
    if not count:
        return np.zeros(0, np.int64)
    width = _width(count, size)
    flags = np.unpackbits(code, bitorder="little")
    places = np.cumsum(_remainders(flags, count, width))
    ends = np.flatnonzero(flags[count * width :])
    if ends.size != count:
        raise GapsCorrupt(f"holds {ends.size} gaps, the header counts {count} pruned weights: the bytes are damaged")
    if extra := code.size - (count * width + int(ends[-1]) + 8) // 8:
        raise GapsCorrupt(f"{extra} bytes follow the last gap: the bytes are damaged")
    order = np.arange(count)
    places += order
    ends -= order  # the quotients, summed up to each gap
    places += ends << width
    if places[-1] >= size:
        raise GapsCorrupt(f"a pruned weight at {places[-1]}, the module has {size}: the bytes are damaged")
    return places


def _width(count: int, size: int) -> int:
    """Bits of a remainder: floor(log2(size / count)), about the best for gaps of this mean."""
    return (size // count).bit_length() - 1


def _check_length(code: bits.Bytes, count: int, size: int) -> None:
    """Refuse what no such code has: it bounds the work, and the quotients."""
    least = most = 0
    if count:
        width = _width(count, size)
        least = count * (width + 1)
        most = least + (size - count >> width)
    if not -(-least // 8) <= code.size <= -(-most // 8):
        wanted = f"{count} gaps in a module of {size} weights take {-(-least // 8)} to {-(-most // 8)}"
        raise GapsCorrupt(f"has {code.size} bytes, {wanted}")


def _remainders(flags: bits.Bytes, count: int, width: int) -> bits.Places:
    """int64[count]: the first `count` numbers of `width` bits, least significant first."""
    item = bits.NARROW if width <= 16 else bits.WIDE
    padded = np.zeros((count, 8 * item.itemsize), np.uint8)
    padded[:, :width] = flags[: count * width].reshape(count, width)
    return np.packbits(padded, bitorder="little").view(item).astype(np.int64)
