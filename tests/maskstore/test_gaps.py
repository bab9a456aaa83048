"""Sparse modules as gaps: the code, what a file in either form has in common, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskstore import (
    Bitmap,
    DeltaReader,
    Mask,
    MaskCorrupt,
    MaskReader,
    MaskWriter,
    Registry,
    Sparse,
    encode,
    export_mask,
    fsck,
    import_mask,
    read_mask,
    rice,
    write_delta,
    write_mask,
)
from maskstore import header as headers
from maskstore.errors import DigestMismatch, GapsCorrupt, HeaderCorrupt, TensorSet
from maskstore.target import GAPS_LIMIT
from tests.maskstore import forge, world
from tests.maskstore.test_delta import relative

SETTINGS = settings(max_examples=80, deadline=None, database=None)
OUT = "model.layers.0.self_attn.o_proj"
RECORDED = Path(__file__).with_name("version1.safetensors")
RECORDED_DELTA = Path(__file__).with_name("version1_delta.safetensors")
DIGEST = "9c3bae20cda7cc910edd675cae4839f5436a0a87527fe7980ba1acf3877b57e2"
DIGEST_OF_DELTA = "1c18972051ba327bb7b3df71c4cc782d490fa53d0ca575ff033d3f98afae7586"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def version(path):
    return forge.split(path.read_bytes())[0]["__metadata__"]["format"]


@st.composite
def sets(draw):
    """A module's size and ascending positions in it, thin or crowded."""
    size = draw(st.sampled_from([1, 2, 63, 1000, 70_000, 2**32]))
    places = draw(st.sets(st.integers(0, size - 1), max_size=60))
    crowd = draw(st.integers(0, min(size, 300)))
    return np.array(sorted(places | set(range(crowd))), np.int64), size


@SETTINGS
@given(sets())
def test_the_code_is_one_to_one(made):
    places, size = made
    code = rice.encode(places, size)
    assert np.array_equal(rice.decode(code, places.size, size), places)
    if places.size:
        width = (size // places.size).bit_length() - 1
        assert 8 * code.size <= places.size * (width + 1) + (size >> width) + 7


@SETTINGS
@given(sets(), st.data())
def test_a_code_that_is_changed_is_refused_or_another_set(made, data):
    """Every set has one code: what decodes is encoded to the same bytes."""
    places, size = made
    code = rice.encode(places, size)
    changed = bytearray(code.tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if changed and data.draw(st.booleans()):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        else:
            changed += data.draw(st.binary(max_size=2))
    content = np.frombuffer(bytes(changed), np.uint8)
    try:
        decoded = rice.decode(content, places.size, size)
    except GapsCorrupt:
        return
    assert np.all(np.diff(decoded) > 0)
    assert decoded.size == places.size
    assert not decoded.size or 0 <= decoded[0] <= decoded[-1] < size
    assert np.array_equal(rice.encode(decoded, size), content)


@pytest.mark.parametrize("shape", [(1, 400), (16, 64), (3, 1000), (5, 65_536), (2, 70_000), (400, 1)])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.9])
def test_gaps_are_smaller_than_rows_and_columns(shape, share):
    pruned = world.pruned(shape, share, 3)
    target = encode(pruned)
    if isinstance(target, Bitmap):
        assert target.stored == target.tensors
        return
    (gaps,) = target.stored.values()
    assert gaps.nbytes < target.nbytes
    again = Sparse.from_gaps(gaps, target.pruned, *shape)
    assert np.array_equal(again.rows, target.rows)
    assert np.array_equal(again.cols, target.cols)
    assert again.cols.dtype == target.cols.dtype


def test_a_large_mask_of_few_weights_is_a_small_file(path):
    shapes = {f"model.layers.{layer}.mlp.up_proj": (1536, 576) for layer in range(8)}
    mask = world.mask(share=0.0008, shapes=shapes)
    write_mask(mask, path)
    data = len(forge.split(path.read_bytes())[1])
    assert 8 * data < 12.5 * mask.pruned  # bits; the entropy of such a set is 11.7 bits a weight
    world.write_rows(mask, path)
    assert 8 * data * 5 < 8 * len(forge.split(path.read_bytes())[1])


@pytest.mark.parametrize("make", [world.mask, world.mixed])
def test_the_form_is_no_part_of_the_identity(path, tmp_path, make):
    mask = make(seed=4)
    world.write_rows(mask, path)
    old = read_mask(path)
    assert version(path) == "masquerade-mask/1"
    write_mask(old, tmp_path / "new")
    new = read_mask(tmp_path / "new")
    assert version(tmp_path / "new") == "masquerade-mask/2"
    assert old.digest == new.digest == mask.digest
    assert old.leaves == new.leaves == mask.leaves
    for name, target in new.targets.items():
        assert {suffix: array.tobytes() for suffix, array in target.tensors.items()} == {
            suffix: array.tobytes() for suffix, array in old.targets[name].tensors.items()
        }


def test_a_file_without_gaps_stays_of_version_1(path):
    mask = world.mask(share=0.5)
    write_mask(mask, path)
    new = path.read_bytes()
    world.write_rows(mask, path)
    assert version(path) == "masquerade-mask/1"
    assert path.read_bytes() == new


def test_gaps_of_more_weights_than_there_are_are_refused(path):
    mask = Mask(world.BASE, {"a": encode(world.pruned((40, 1), 0.02, 1))}, world.info())
    write_mask(mask, path)
    assert version(path) == "masquerade-mask/2"
    path.write_bytes(forge.edit_json(path.read_bytes(), "modules", lambda modules: modules["a"].__setitem__(3, 50)))
    with pytest.raises(HeaderCorrupt, match="counts 50 pruned weights"):
        read_mask(path)


def test_a_sparse_target_that_a_bitmap_would_undercut_keeps_its_rows(path):
    target = encode(world.pruned((16, 64), 0.5, 1)).to_sparse()
    mask = Mask(world.BASE, {"a": target}, world.info())
    write_mask(mask, path)
    assert version(path) == "masquerade-mask/1"
    assert read_mask(path) == mask


def test_what_an_older_version_wrote(tmp_path):
    """Two files that the writer left that knew no gaps: a signed mask, and a signed delta against it."""
    signing = pytest.importorskip("maskstore.signing")
    mask = read_mask(RECORDED, base=world.BASE.fingerprint)
    assert mask.digest == DIGEST
    assert {target.kind for target in mask.targets.values()} == {"bitmap", "sparse"}
    assert signing.examine(mask, {}).valid
    with DeltaReader(RECORDED_DELTA, {DIGEST: mask}.__getitem__) as reader:
        child = reader.mask()
    assert child.digest == DIGEST_OF_DELTA
    assert signing.examine(child, {}).valid
    for one in (mask, child):
        write_mask(one, tmp_path / "again")
        again = read_mask(tmp_path / "again")
        assert (version(tmp_path / "again"), again.digest) == ("masquerade-mask/2", one.digest)
        assert signing.examine(again, {}).valid
        assert again.signature == one.signature


def test_a_store_with_files_of_both_versions(tmp_path):
    store = Registry(tmp_path / "store").store
    for file, digest in ((RECORDED, DIGEST), (RECORDED_DELTA, DIGEST_OF_DELTA)):
        assert import_mask(store, file).digest == digest
    assert version(store.path(DIGEST)) == "masquerade-mask/1"
    assert version(store.path(DIGEST_OF_DELTA)) == "masquerade-mask/2"
    assert fsck(store.root).clean
    exported = export_mask(store, DIGEST, tmp_path / "out")
    assert exported.nbytes < RECORDED.stat().st_size
    assert version(tmp_path / "out") == "masquerade-mask/2"
    assert import_mask(store, tmp_path / "out") == store.open(DIGEST)
    assert version(store.path(DIGEST)) == "masquerade-mask/1"  # the copy that was there first


def test_gaps_in_a_delta(path):
    parent = world.mask(share=0.4, shapes={"a": (64, 256)})
    child = world.mask(seed=7, share=0.004, shapes={"a": (64, 256), "b": (32, 256)})
    write_delta(child, parent, path)
    assert version(path) == "masquerade-delta/2"
    with DeltaReader(path, {parent.digest: parent}.__getitem__) as reader:
        assert reader.mask() == child
    near = relative(parent, 1)
    write_delta(near, parent, path)
    assert version(path) == "masquerade-delta/1"


def test_modules_are_decoded_one_at_a_time(path):
    mask = world.mask(share=0.01, shapes={"a": (64, 256), "b": (64, 256)})
    with MaskWriter(path, mask.base, mask.info) as writer:
        for name in ("b", "a"):
            writer.add(name, mask.targets[name])
    assert writer.digest == mask.digest
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x80
    path.write_bytes(raw)
    with MaskReader(path) as reader:
        assert reader["a"].pruned == mask.targets["a"].pruned
        assert reader.header.modules["b"].pruned == mask.targets["b"].pruned
        with pytest.raises(GapsCorrupt):
            reader["b"]


def refusal(path, raw, error, verify=True):
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_mask(path, verify=verify)
    assert type(caught.value) is error
    assert caught.value.path == path
    return str(caught.value)


def coded(path, places, shape=(16, 64)):
    pruned = np.zeros(shape[0] * shape[1], bool)
    pruned[places] = True
    write_mask(Mask(world.BASE, {OUT: encode(pruned.reshape(shape))}, world.info()), path)
    return path.read_bytes()


def swap(raw, content):
    """The file with other gaps, whatever their length; the digests are made to fit what they decode to."""
    document, _ = forge.split(raw)
    document[f"{OUT}.gaps"].update(shape=[len(content)], data_offsets=[0, len(content)])
    forge.rehash(document, content)
    return forge.join(document, content)


def bits(text):
    """Bits in the order of the code, spaces ignored."""
    return np.packbits([int(bit) for bit in text if bit != " "], bitorder="little").tobytes()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bits("0" * 18 + "1 1"), None),
        (bits("1" * 9 + "0" * 9 + "01 1"), None),
        (bits("1" * 18 + "1 01"), "a pruned weight at 1535, the module has 1080"),
        (bits("0" * 18 + "01 001"), "a pruned weight at 1537, the module has 1080"),
        (bits("0" * 18 + "1 0"), "holds 1 gaps, the header counts 2 pruned weights"),
        (bits("0" * 18 + "1 1 1"), "holds 3 gaps, the header counts 2 pruned weights"),
        (b"", "has 0 bytes, 2 gaps in a module of 1080 weights take 3 to 3"),
        (bits("0" * 18 + "1 1") + b"\0", "has 4 bytes, 2 gaps in a module of 1080 weights take 3 to 3"),
    ],
)
def test_gaps_that_break_a_rule(path, verify, content, words):
    """Two weights of 18 x 60, so remainders of 9 bits."""
    raw = swap(coded(path, [0, 1], (18, 60)), content)
    path.write_bytes(raw)
    if words is None:
        assert read_mask(path, verify=verify).pruned == 2
        return
    assert f"{OUT}.gaps: {words}" in refusal(path, raw, GapsCorrupt, verify)


def test_bytes_after_the_last_gap(path):
    raw = coded(path, list(range(16)))
    gaps = forge.split(raw)[1]
    assert f"{OUT}.gaps: 1 bytes follow the last gap" in refusal(path, swap(raw, gaps + b"\0"), GapsCorrupt)


def test_no_gaps_take_no_bytes(path):
    raw = coded(path, [])
    assert read_mask(path).pruned == 0
    assert "has 1 bytes, 0 gaps in a module of 1024 weights take 0 to 0" in refusal(path, swap(raw, b"\0"), GapsCorrupt)


def test_every_bit_of_the_gaps_is_verified(path):
    raw = coded(path, [3, 70, 500, 501, 1000])
    _, data = forge.split(raw)
    for bit in range(8 * len(data)):
        damaged = bytearray(raw)
        damaged[len(raw) - len(data) + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises((GapsCorrupt, DigestMismatch), match="the bytes are damaged") as caught:
            read_mask(path)
        assert caught.value.tensor == f"{OUT}.gaps"


def counted(count):
    return lambda modules: modules[OUT].__setitem__(slice(3, None), [count])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (counted(-1), "counts -1 pruned weights"),
        (counted(1000), "counts 1000 pruned weights"),
        (counted(GAPS_LIMIT + 1), f"counts {GAPS_LIMIT + 1} pruned weights"),
        (counted(True), "expected name: [out, in, sha256]"),
        (counted("2"), "expected name: [out, in, sha256]"),
        (lambda modules: modules[OUT].append(2), "expected name: [out, in, sha256]"),
        (lambda modules: modules[OUT].pop(), "is in gaps and does not count its pruned weights"),
    ],
)
def test_a_count_that_cannot_be(path, change, words):
    assert words in refusal(path, forge.edit_json(coded(path, [3, 70]), "modules", change), HeaderCorrupt)


def test_a_count_of_what_is_not_in_gaps(path):
    world.write_rows(world.mixed(), path)
    counts = forge.edit_json(path.read_bytes(), "modules", counted(2))
    assert "is not in gaps and counts its pruned weights" in refusal(path, counts, HeaderCorrupt)


def test_another_count_is_noticed(path):
    raw = coded(path, [3, 70])
    for count in (0, 1, 3, 4):
        refusal(path, forge.edit_json(raw, "modules", counted(count)), GapsCorrupt)


def test_version_1_has_no_gaps(path):
    first = forge.edit(coded(path, [3, 70]), lambda d: d["__metadata__"].update(format="masquerade-mask/1"))
    assert f"{OUT}.rows: is missing" in refusal(path, first, TensorSet)


def test_small_files_of_huge_masks(path):
    """The rows of a decoded module are not in the file, so their number is limited."""
    entry, sha256 = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "0" * 64
    names = [f"m{at}" for at in range(headers.ROW_LIMIT // (1 << 20) + 1)]
    document, _ = forge.split(coded(path, []))
    document = {"__metadata__": document["__metadata__"]} | {f"{name}.gaps": entry for name in names}
    document["__metadata__"]["modules"] = json.dumps({name: [1 << 20, 1, sha256, 0] for name in names})
    assert f"the limit is {headers.ROW_LIMIT}" in refusal(path, forge.join(document, b""), HeaderCorrupt)
    target = encode(np.zeros((1 << 20, 1), bool))
    with pytest.raises(HeaderCorrupt, match="the limit is"):
        write_mask(Mask(world.BASE, dict.fromkeys(names, target), world.info()), path)


@SETTINGS
@given(st.binary(max_size=64), st.integers(0, 60))
def test_hostile_gaps(tmp_path_factory, content, count):
    path = tmp_path_factory.mktemp("hostile") / "m"
    raw = swap(forge.edit_json(coded(path, [3, 70]), "modules", counted(count)), content)
    path.write_bytes(raw)
    try:
        mask = read_mask(path)
    except MaskCorrupt:
        return
    assert mask.pruned == count
    write_mask(mask, path)
    assert forge.split(path.read_bytes())[1] == content
