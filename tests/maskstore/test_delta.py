import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskstore import (
    DeltaReader,
    Mask,
    MaskMismatch,
    MaskNotFound,
    algebra,
    encode,
    read_mask,
    write_delta,
    write_mask,
)
from maskstore.delta import decode_flips, encode_flips
from maskstore.errors import DeltaCorrupt, DigestMismatch, MaskTruncated, NotAMask
from tests.maskstore import forge, world

SETTINGS = settings(max_examples=60, deadline=None, database=None)
NAME = "model.layers.0.mlp.down_proj"


def relative(mask, seed, share=0.01):
    """A mask that differs from another in a few places."""
    rng = np.random.default_rng(seed)
    flipped = {name: ~target.to_keep() ^ (rng.random(target.shape) < share) for name, target in mask.targets.items()}
    return Mask(mask.base, {name: encode(flags) for name, flags in flipped.items()}, world.info("cousin", gamma=0.5))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "d.safetensors"


@SETTINGS
@given(st.sets(st.integers(0, 5000)))
def test_gap_code(positions):
    places = np.array(sorted(positions), np.int64)
    stream = encode_flips(places)
    runs = list(decode_flips(stream, 5001))
    assert np.array_equal(np.concatenate([np.zeros(0, np.int64), *runs]), places)
    assert stream.size == places.size + sum(gap // 255 for gap in np.diff(places, prepend=-1) - 1)


@SETTINGS
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.5]), st.sampled_from([1, 63, 64, 200]), st.booleans())
def test_flips_and_flip_are_inverse(seed, share, columns, dense):
    rng = np.random.default_rng(seed)
    a, b = (rng.random((5, columns)) < share for _ in range(2))
    before = encode(a).to_bitmap() if dense else encode(a).to_sparse()
    places = algebra.flips(before, encode(b))
    assert np.array_equal(places, np.flatnonzero(a ^ b))
    cut = len(places) // 2
    assert np.array_equal(~algebra.flip(before, [places[:cut], places[cut:]]).to_keep(), b)


@pytest.mark.parametrize("share", [0.001, 0.03, 0.5])
def test_round_trip_gives_the_same_digest(path, tmp_path, share):
    parent = world.mask(share=0.4, shapes={"a": (64, 256), "b": (64, 100), "c": (3, 7)})
    child = relative(parent, 1, share)
    write_delta(child, parent, path)
    with DeltaReader(path, {parent.digest: parent}.__getitem__) as reader:
        again = reader.mask()
    assert again == child
    assert again.info == child.info
    write_mask(child, tmp_path / "whole")
    write_mask(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_near_relative_is_much_smaller(path, tmp_path):
    parent = world.mask(share=0.5, shapes={"a": (512, 1024)})
    child = relative(parent, 1, 0.007)
    write_delta(child, parent, path)
    write_mask(child, tmp_path / "whole")
    assert path.stat().st_size < 0.11 * (tmp_path / "whole").stat().st_size


def test_new_and_reshaped_modules_are_kept_whole(path):
    parent = world.mask(shapes={"a": (4, 64), "b": (4, 64)})
    child = world.mask(1, shapes={"a": (4, 64), "b": (8, 64), "c": (2, 2)})
    write_delta(child, parent, path)
    with DeltaReader(path, lambda _: parent) as reader:
        assert reader.mask() == child


def test_a_delta_is_not_a_mask_and_the_other_way_round(path):
    parent = world.mixed()
    write_delta(relative(parent, 1), parent, path)
    with pytest.raises(MaskMismatch, match=f"is a delta against the mask {parent.digest[:16]}"):
        read_mask(path)
    write_mask(parent, path)
    with pytest.raises(NotAMask, match="not a delta"):
        DeltaReader(path, lambda _: parent)


def test_wrong_parents(path):
    parent = world.mixed()
    write_delta(relative(parent, 1), parent, path)
    stranger = world.mixed(seed=5)
    with DeltaReader(path, lambda _: stranger) as reader, pytest.raises(DigestMismatch, match="is wanted"):
        reader.mask()
    other = world.mask(base=world.OTHER)
    with DeltaReader(path, lambda _: other) as reader, pytest.raises(MaskMismatch, match="of different bases"):
        reader.mask()
    with pytest.raises(MaskMismatch, match="of different bases"):
        write_delta(parent, other, path)

    def absent(digest):
        raise MaskNotFound(f"no mask {digest}")

    with DeltaReader(path, absent) as reader, pytest.raises(MaskNotFound):
        reader.mask()


@pytest.mark.parametrize(
    ("stream", "error", "words"),
    [
        (b"\xff\xff\xff", DeltaCorrupt, "the last byte skips"),
        (b"\xff" * 9 + b"\x7f", DeltaCorrupt, "a flip at weight 2422, the module has 2400"),
        (b"\x00", DigestMismatch, "the delta or its parent is damaged"),
        (b"\x00" * 500, DeltaCorrupt, "500 bytes of flips, the module itself would take 384"),
    ],
)
def test_hostile_streams(path, stream, error, words):
    parent = world.mask(share=0.5, shapes={NAME: (24, 100)})
    write_delta(relative(parent, 1), parent, path)
    document, _ = forge.split(path.read_bytes())
    name = f"{NAME}.flips_bitmap"
    document[name].update(shape=[len(stream)], data_offsets=[0, len(stream)])
    path.write_bytes(forge.join(document, stream))
    with DeltaReader(path, lambda _: parent) as reader, pytest.raises(error, match=words) as caught:
        reader.mask()
    assert caught.value.tensor == name
    assert caught.value.path == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MaskTruncated):
        DeltaReader(path, lambda _: parent)


def test_a_parent_without_the_module(path):
    parent = world.mask(share=0.5, shapes={NAME: (24, 100)})
    write_delta(relative(parent, 1), parent, path)
    document, data = forge.split(path.read_bytes())
    other = world.mask(share=0.5, shapes={"b": (24, 100)})
    document["__metadata__"]["parent"] = other.digest
    path.write_bytes(forge.join(document, data))
    with DeltaReader(path, lambda _: other) as reader, pytest.raises(MaskMismatch, match="no such module of 24 x 100"):
        reader.mask()
