"""Every operation against plain boolean arrays."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskstore import (
    BaseRef,
    Bitmap,
    DeltaReader,
    InvalidMaskValue,
    Mask,
    MaskMismatch,
    Sparse,
    algebra,
    bits,
    encode,
    majority,
    read_mask,
    write_delta,
    write_mask,
)
from tests.maskstore import world

KINDS = {
    "smaller": encode,
    "bitmap": lambda flags: encode(flags).to_bitmap(),
    "sparse": lambda flags: encode(flags).to_sparse(),
}
SETTINGS = settings(max_examples=60, deadline=None, database=None)


@st.composite
def sets(draw, count=2):
    """Boolean arrays of one shape: empty, sparse, dense and full ones."""
    shape = draw(st.integers(1, 9)), draw(st.sampled_from([1, 7, 8, 63, 64, 65, 128, 200]))
    seed = draw(st.integers(0, 2**32 - 1))
    shares = draw(st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=count, max_size=count))
    rng = np.random.default_rng(seed)
    return [rng.random(shape) < share for share in shares]


kinds = st.sampled_from(sorted(KINDS))


@SETTINGS
@given(sets(), kinds, kinds)
def test_operations(flags, one, two):
    a, b = flags
    left, right = KINDS[one](a), KINDS[two](b)
    for operation, expected in [
        (algebra.union, a | b),
        (algebra.intersection, a & b),
        (algebra.difference, a & ~b),
    ]:
        _check(operation(left, right), expected)
    _check(algebra.complement(left), ~a)
    assert algebra.overlap(left, right) == (a & b).sum()


@SETTINGS
@given(sets(count=4), st.lists(kinds, min_size=4, max_size=4), st.integers(1, 4))
def test_majority(flags, names, least):
    targets = [KINDS[name](each) for name, each in zip(names, flags, strict=True)]
    _check(algebra.majority(targets, least), np.sum(flags, axis=0) >= least)


@SETTINGS
@given(sets(count=1), kinds)
def test_conversions(flags, kind):
    (expected,) = flags
    target = KINDS[kind](expected)
    assert target.pruned == expected.sum()
    for each in (target, target.to_bitmap(), target.to_sparse()):
        assert np.array_equal(each.to_keep(), ~expected)
    assert isinstance(target.to_bitmap(), Bitmap)
    assert isinstance(target.to_sparse(), Sparse)


@SETTINGS
@given(sets(count=1))
def test_bits(flags):
    (expected,) = flags
    packed = bits.pack(expected)
    assert np.array_equal(packed[:, : -(-expected.shape[1] // 8)], np.packbits(expected, axis=1, bitorder="little"))
    assert np.array_equal(bits.unpack(packed, expected.shape[1]), expected)
    assert bits.popcount(packed) == expected.sum()
    assert bits.padded_row(packed, expected.shape[1]) is None
    rows, cols = bits.to_csr(expected)
    assert np.array_equal(bits.from_csr(rows, cols, expected.shape[1]), expected)


@settings(max_examples=30, deadline=None, database=None)
@given(sets(count=3), st.lists(kinds, min_size=3, max_size=3))
def test_files(flags, names):
    """Any mixture of encodings, through a file and through a delta."""
    a, b, c = (KINDS[name](each) for name, each in zip(names, flags, strict=True))
    parent = Mask(world.BASE, {"x": a, "z": b}, world.info())
    mask = Mask(world.BASE, {"x": b, "y": c, "z": a}, world.info())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        write_mask(mask, path)
        again = read_mask(path)
        write_delta(mask, parent, path)
        with DeltaReader(path, {parent.digest: parent}.__getitem__) as reader:
            through = reader.mask()
    assert again.digest == through.digest == mask.digest
    for each in (again, through):
        assert {name: type(target) for name, target in each.targets.items()} == {
            "x": type(b),
            "y": type(c),
            "z": type(a),
        }
        assert np.array_equal(each.targets["y"].to_keep(), ~flags[2])


def _check(target, expected):
    """The right set, in the encoding and the bytes `encode` gives it."""
    assert np.array_equal(~target.to_keep(), expected)
    direct = encode(expected)
    assert type(target) is type(direct)
    for suffix, array in direct.tensors.items():
        assert np.array_equal(target.tensors[suffix], array)


def test_masks_combine_module_by_module():
    a, b = world.mask(1, share=0.3), world.mask(2, share=0.3)
    for mask, expected in [
        (a | b, lambda x, y: x & y),
        (a & b, lambda x, y: x | y),
        (a - b, lambda x, y: x | ~y),
        (~a, lambda x, _: ~x),
    ]:
        for name, target in mask.targets.items():
            keeps = a.targets[name].to_keep(), b.targets[name].to_keep()
            assert np.array_equal(target.to_keep(), expected(*keeps))


def test_laws():
    a, b, c = (world.mask(seed, share=0.2) for seed in range(3))
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a - b == a & ~b
    assert ~~a == a
    assert ~(a | b) == ~a & ~b
    assert majority([a, b, c]) == (a & b) | (a & c) | (b & c)
    assert majority([a, b, c], 1) == a | b | c
    assert majority([a, b, c], 3) == a & b & c
    assert (a - a).pruned == 0
    assert (a | ~a).density == 0


def test_a_module_one_mask_lacks_prunes_nothing():
    a = world.mask(1, share=0.3)
    part = Mask(a.base, dict(list(a.targets.items())[:1]), a.info)
    assert (a & part).targets.keys() == a.targets.keys()
    assert (a & part).pruned == part.pruned
    assert (part | a) == a


def test_ancestry():
    a, b = world.mask(1, gamma=0.5), world.mask(2, persona="monk")
    info = (a | b).info
    assert info.ancestry == {
        "expression": f"{a.digest[:8]} | {b.digest[:8]}",
        "parents": {a.digest: "pirate", b.digest: "monk"},
    }
    assert (info.persona, info.score, info.gamma) == ("pirate", "algebra", 0.5)


def test_what_does_not_combine():
    with pytest.raises(MaskMismatch, match=r"different bases .* \(tiny\) and .* \(other\)"):
        world.mask() | world.mask(base=world.OTHER)
    renamed = world.mask(base=BaseRef(world.BASE.fingerprint, "another name of the same"))
    assert (world.mask() | renamed) == world.mask()
    with pytest.raises(MaskMismatch, match=r"x: 2 x 3 and 3 x 2 cannot be combined"):
        world.mask(shapes={"x": (2, 3)}) | world.mask(shapes={"x": (3, 2)})
    with pytest.raises(InvalidMaskValue, match="majority of 3 among 2"):
        majority([world.mask(), world.mask()], 3)


def test_majority_of_sparse_ones():
    rng = np.random.default_rng(0)
    flags = [rng.random((40, 300)) < 0.02 for _ in range(5)]
    for least in range(1, 6):
        target = algebra.majority([encode(each) for each in flags], least)
        _check(target, np.sum(flags, axis=0) >= least)
    with pytest.raises(InvalidMaskValue, match="at least 0 of 1"):
        algebra.majority([encode(flags[0])], 0)
