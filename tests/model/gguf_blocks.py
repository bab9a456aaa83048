"""Quantises into any of GGUF's types that the kernels multiply; the gguf package has no quantiser of the K types."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from numpy.typing import NDArray

SUPER = 256  # values of a block
_INSTEAD = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def choose(kind: Kind, columns: int) -> Kind:
    """The type that llama.cpp takes for rows of so many values: K types need whole blocks."""
    return _INSTEAD.get(kind, kind) if columns % SUPER else kind


def quantise(values: Floats, kind: Kind) -> NDArray[Any]:
    """Rows of a type: the nearest codes to scales from each group's extremes, without llama.cpp's search for better."""
    if kind not in _INSTEAD:
        return quants.quantize(values, kind)
    blocks = values.reshape(-1, SUPER)
    raw = _quantise_6_bits(blocks) if kind is Kind.Q6_K else _quantise_with_offset(blocks, 4 + (kind is Kind.Q5_K))
    return raw.reshape(len(values), -1)


def _quantise_with_offset(blocks: Floats, bits: int) -> Bytes:
    groups = blocks.reshape(len(blocks), 8, 32)
    lowest = np.minimum(groups.min(-1), 0)
    scale, scales = _nest((groups.max(-1) - lowest) / (2**bits - 1), 63)
    offset, offsets = _nest(-lowest, 63)
    codes = _divide(groups + (offset * offsets)[..., None], (scale * scales)[..., None], 0, 2**bits - 1)
    low, high = codes[:, ::2] & 15, codes[:, 1::2] & 15
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little") if bits == 5 else np.empty((len(blocks), 0), np.uint8)
    return np.concatenate(
        [_as_bytes(scale), _as_bytes(offset), _pack_six(scales, offsets), *_flat(fifth, low | high << 4)], 1
    )


def _quantise_6_bits(blocks: Floats) -> Bytes:
    groups = blocks.reshape(len(blocks), 16, 16)
    scale, scales = _nest(np.abs(groups).max(-1) / 31, 127)
    codes = _divide(groups, (scale * scales)[..., None], -32, 31) + 32
    parts = codes.astype(np.uint8).reshape(len(blocks), 2, 4, 32)  # halves of a block, quarters of a half
    nibbles = parts[:, :, :2] & 15 | (parts[:, :, 2:] & 15) << 4
    pairs = np.bitwise_or.reduce((parts >> 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None], 2)
    return np.concatenate([*_flat(nibbles, pairs), scales.astype(np.int8).view(np.uint8), _as_bytes(scale)], 1)


def _nest(values: Floats, most: int) -> tuple[Floats, Floats]:
    """The scale of a block in fp16, and whole multiples of it."""
    scale = (values.max(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    return scale, _divide(values, scale, 0, most).astype(np.float32)


def _divide(values: Floats, scale: Floats, low: int, high: int) -> Bytes:
    whole = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)).clip(low, high)
    return whole.astype(np.int8 if low < 0 else np.uint8)


def _pack_six(scales: Floats, offsets: Floats) -> Bytes:
    """Eight scales and eight offsets of 6 bits in 12 bytes."""
    first, last = (values.astype(np.uint8) for values in (scales, offsets))
    low = [values[:, :4] | (values[:, 4:] >> 4) << 6 for values in (first, last)]
    return np.concatenate([*low, first[:, 4:] & 15 | (last[:, 4:] & 15) << 4], 1)


def _as_bytes(scale: Floats) -> Bytes:
    return scale.astype("<f2").view(np.uint8)


def _flat(*arrays: Bytes) -> list[Bytes]:
    return [array.reshape(len(array), -1) for array in arrays]
