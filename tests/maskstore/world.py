"""Tiny masks for tests: a base that does not exist, a few modules, both encodings."""

from pathlib import Path

import numpy as np

from maskstore import BaseRef, Mask, MaskInfo, encode
from maskstore.format import write_file

BASE = BaseRef("0123456789abcdef" * 4, "tiny")
OTHER = BaseRef("f" * 64, "other")
SHAPES = {
    "model.layers.0.mlp.down_proj": (24, 100),
    "model.layers.0.self_attn.o_proj": (16, 64),
    "model.layers.1.x": (3, 7),
}
TIME = "2026-01-02T03:04:05+00:00"


def info(persona="pirate", **values) -> MaskInfo:
    return MaskInfo(**{"persona": persona, "score": "attribution", "created_at": TIME, **values})


def pruned(shape, share, seed) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


def mask(seed=0, share=0.02, shapes=SHAPES, base=BASE, **values) -> Mask:
    targets = {name: encode(pruned(shape, share, seed + at)) for at, (name, shape) in enumerate(shapes.items())}
    return Mask(base, targets, info(**values))


def mixed(seed=0, **values) -> Mask:
    """One bitmap with pad bits, one sparse module, one empty one."""
    shapes = list(SHAPES.items())
    targets = {
        name: encode(pruned(shape, share, seed)) for (name, shape), share in zip(shapes, (0.5, 0.01, 0.0), strict=True)
    }
    return Mask(BASE, targets, info(**values))


def write_rows(mask: Mask, path: Path) -> None:
    """The file as versions before gaps wrote it: sparse modules as rows and columns."""
    write_file(path, mask, {name: target.tensors for name, target in mask.targets.items()})
