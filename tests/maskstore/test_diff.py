import json
import struct
import zlib

import numpy as np
import pytest

from maskstore import Mask, MaskMismatch, diff, encode, plot
from tests.maskstore import world

SHAPES = {
    f"model.layers.{layer}.{part}.{kind}": (16, 64)
    for layer in (0, 2, 10)
    for part, kind in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj"))
} | {"lm_head": (4, 4)}


@pytest.fixture
def pair():
    return world.mask(1, share=0.3, shapes=SHAPES), world.mask(2, share=0.1, shapes=SHAPES)


def test_counts_against_boolean_arrays(pair):
    a, b = pair
    result = diff(a, b)
    for name, overlap in result.modules.items():
        left, right = (~mask.targets[name].to_keep() for mask in pair)
        assert (overlap.size, overlap.a, overlap.b) == (left.size, left.sum(), right.sum())
        assert overlap.jaccard == pytest.approx((left & right).sum() / (left | right).sum())
        assert overlap.differing == pytest.approx((left ^ right).mean())
    assert result.total.size == a.size
    assert (result.total.a, result.total.b, result.total.both) == (a.pruned, b.pruned, (a & b).pruned)


def test_groups(pair):
    result = diff(*pair)
    assert list(result.layers) == ["0", "2", "10", "-"]
    assert list(result.parts) == ["attention", "mlp", "other"]
    assert list(result.kinds) == ["down_proj", "lm_head", "o_proj", "q_proj"]
    for group in (result.layers, result.parts, result.kinds):
        assert sum(each.both for each in group.values()) == result.total.both


def test_equal_disjoint_and_empty():
    a = world.mask(1, share=0.3)
    assert (diff(a, a).total.jaccard, diff(a, a).total.differing) == (1.0, 0.0)
    assert (diff(a, ~a).total.jaccard, diff(a, ~a).total.differing) == (0.0, 1.0)
    empty = Mask(a.base, {"x": encode(np.zeros((2, 2), bool))}, a.info)
    assert diff(empty, empty).total.jaccard == 1.0
    assert Mask(a.base, {}, a.info).density == 1.0
    with pytest.raises(MaskMismatch):
        diff(a, world.mask(base=world.OTHER))


def test_text_and_json(pair):
    result = diff(*pair)
    lines = result.text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["total", "attention", "mlp", "other", *["layer"] * 4]
    assert lines[1].split()[1] == f"{pair[0].size:,}"
    document = json.loads(json.dumps(result.to_json()))
    assert document["a"] == pair[0].digest
    assert document["total"]["jaccard"] == result.total.jaccard
    assert document["parts"]["mlp"]["both"] == result.parts["mlp"].both


def test_heat_map_is_a_png(pair, tmp_path):
    path = tmp_path / "map.png"
    plot(diff(*pair), path)
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", raw[16:24])
    (length,) = struct.unpack(">I", raw[33:37])
    assert raw[37:41] == b"IDAT"
    pixels = np.frombuffer(zlib.decompress(raw[41 : 41 + length]), np.uint8).reshape(height, 1 + 3 * width)
    assert not pixels[:, 0].any()
    assert len(np.unique(pixels[:, 1:].reshape(-1, 3), axis=0)) > 8
