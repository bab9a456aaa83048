"""A heat map of a diff as a PNG.

It writes the PNG itself: with Pillow or matplotlib as an extra, this plot and that of `masquerade.evaluate` would fail
in a plain installation.
"""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskstore import files
from maskstore.diff import Diff, table

Image = NDArray[np.uint8]
CELL_WIDTH, CELL_HEIGHT, MARGIN = 60, 14, 8
_LOW, _MIDDLE, _HIGH = np.array([[68, 1, 84], [33, 145, 140], [253, 231, 37]], float)  # dark: equal; bright: disjoint
_EMPTY = np.array([225, 225, 225], np.uint8)
_GLYPHS = (  # 3 x 5 points, an octal digit a row
    "075557 126227 271747 371717 455711 574717 674757 771111 875757 975717 "
    "a25755 b65656 c34443 d65556 e74647 f74644 g34553 h55755 i72227 j11152 k55655 l44447 m57755 "
    "n65555 o25552 p65644 q25563 r65655 s34216 t72222 u55553 v55522 w55775 x55255 y55222 z71247 _00007 -00700 .00002"
)
_FONT = {glyph[0]: glyph[1:] for glyph in _GLYPHS.split()}
_BLANK = "00000"


def plot(diff: Diff, path: str | os.PathLike[str]) -> None:
    """Write a plot of layers by kinds of module; the colour is 1 - Jaccard, grey where neither mask prunes anything."""
    layers, kinds, cells = table(diff)
    left, top = MARGIN + 4 * (max(map(len, layers)) + 1), MARGIN + 24
    image = np.full(
        (top + len(layers) * CELL_HEIGHT + MARGIN, left + len(kinds) * CELL_WIDTH + MARGIN, 3), 255, np.uint8
    )
    _write(image, MARGIN, MARGIN, f"jaccard {diff.total.jaccard:.3f} {diff.a[:8]} {diff.b[:8]}")
    for column, kind in enumerate(kinds):
        _write(image, top - 8, left + column * CELL_WIDTH + 2, kind[: CELL_WIDTH // 4 - 1])
    for row, layer in enumerate(layers):
        y = top + row * CELL_HEIGHT
        _write(image, y + 4, MARGIN, layer)
        for column, kind in enumerate(kinds):
            overlap = cells.get((layer, kind))
            x = left + column * CELL_WIDTH
            share = overlap.jaccard if overlap and overlap.either else None
            image[y : y + CELL_HEIGHT - 1, x : x + CELL_WIDTH - 1] = _EMPTY if share is None else _colour(1 - share)
    with files.replacing(Path(path)) as file:
        file.write(encode(image))


def encode(image: Image) -> bytes:
    """uint8[height, width, 3] -> a PNG file."""
    height, width, _ = image.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)  # filter 0 a line
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def _colour(share: float) -> Image:
    low, high, at = (_LOW, _MIDDLE, share * 2) if share < 0.5 else (_MIDDLE, _HIGH, share * 2 - 1)
    colour: Image = (low + (high - low) * at).astype(np.uint8)
    return colour


def _write(image: Image, y: int, x: int, text: str) -> None:
    """Draw text with the 3 x 5 font, cut off at the edge."""
    for place, character in enumerate(text):
        rows = _FONT.get(character, _BLANK)
        glyph = np.array([[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in rows], bool)
        area = image[y : y + 5, x + 4 * place : x + 4 * place + 3]
        area[glyph[:, : area.shape[1]]] = 0
