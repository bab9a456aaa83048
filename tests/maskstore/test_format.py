import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from maskstore import MaskCorrupt, MaskMismatch, MaskNotFound, MaskReader, UnknownVersion, read_mask, write_mask
from maskstore.errors import (
    ColumnOrder,
    DigestMismatch,
    HeaderCorrupt,
    MaskTruncated,
    NotAMask,
    PadBits,
    SealMismatch,
    TensorOffsets,
    TensorSet,
    TensorShape,
)
from tests.maskstore import forge, world

DOWN = "model.layers.0.mlp.down_proj"  # a bitmap, 24 x 100
OUT = "model.layers.0.self_attn.o_proj"  # sparse, 16 x 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


@pytest.fixture
def raw(path):
    """A bitmap, and sparse modules as rows and columns."""
    world.write_rows(world.mixed(), path)
    return path.read_bytes()


@pytest.fixture
def coded(path):
    """A bitmap, and sparse modules as gaps."""
    write_mask(world.mixed(), path)
    return path.read_bytes()


def refusal(path, raw, error):
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_mask(path)
    assert type(caught.value) is error
    assert caught.value.path == path
    return str(caught.value)


@pytest.mark.parametrize("make", [world.mask, world.mixed])
def test_round_trip(path, make):
    mask = make(gamma=0.25, phase="decode", opposite="landlubber", certificate={"flip": 0.9}, parameters={"rho": 0.003})
    write_mask(mask, path)
    again = read_mask(path, base=world.BASE.fingerprint)
    assert again == mask
    assert again.info == mask.info
    assert again.base == mask.base
    for name, target in mask.targets.items():
        assert np.array_equal(again.targets[name].to_keep(), target.to_keep())
        assert type(again.targets[name]) is type(target)


def test_the_file_is_a_function_of_the_mask(path, tmp_path):
    write_mask(world.mixed(), path)
    write_mask(read_mask(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_safetensors_itself_reads_it(path):
    mask = world.mixed()
    write_mask(mask, path)
    tensors = load_file(path)
    assert np.array_equal(tensors[f"{DOWN}.keep"], mask.targets[DOWN].keep)
    assert np.array_equal(tensors[f"{OUT}.gaps"], mask.targets[OUT].stored["gaps"])


def test_tensors_are_mapped_and_aligned(path):
    mask = world.mask(share=0.03, shapes={f"m{n}": (5 + n, 300 + n) for n in range(9)})
    world.write_rows(mask, path)
    for target in read_mask(path).targets.values():
        assert all(not array.flags.owndata and array.flags.aligned for array in target.tensors.values() if array.size)


def test_unverified_reading_still_checks_structure(path, raw):
    path.write_bytes(forge.patch(raw, f"{OUT}.cols", lambda cols: cols.__setitem__(slice(0, 2), b"\xff\xff")))
    with pytest.raises(ColumnOrder):
        read_mask(path, verify=False)


def test_writing_replaces_atomically(path, monkeypatch):
    write_mask(world.mask(), path)
    before = path.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_mask(world.mask(seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("form", ["raw", "coded"])
def test_truncation_everywhere(path, form, request):
    raw = request.getfixturevalue(form)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for length in [0, 3, 7, 8, 100, header - 1, header, header + 1, len(raw) - 1]:
        assert "file" in refusal(path, raw[:length], MaskTruncated)


@pytest.mark.parametrize("form", ["raw", "coded"])
def test_any_flipped_byte_is_noticed(path, form, request):
    raw = request.getfixturevalue(form)
    for at in [*range(0, len(raw), 7), *range(len(raw) - 60, len(raw))]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(MaskCorrupt):
            read_mask(path)


def test_a_flipped_bit_names_its_tensor(path, raw):
    document, data = forge.split(raw)
    for tensor, (begin, end) in [(name, entry["data_offsets"]) for name, entry in document.items() if "." in name]:
        if begin == end:
            continue
        damaged = bytearray(raw)
        damaged[len(raw) - len(data) + begin] ^= 4
        message = refusal(path, bytes(damaged), DigestMismatch)
        assert tensor.rsplit(".", 1)[0] in message
        assert "damaged" in message


def test_a_flipped_bit_in_the_header(path, raw):
    assert "the header is damaged" in refusal(path, raw.replace(b"pirate", b"qirate"), SealMismatch)


def test_another_base(path, raw):
    with pytest.raises(
        MaskMismatch, match=r"is for the base 0123456789abcdef \(tiny\), the base here is ffffffffffffffff"
    ):
        read_mask(path, base=world.OTHER.fingerprint)


def test_unknown_version(path, raw):
    later = forge.edit(raw, lambda document: document["__metadata__"].update(format="masquerade-mask/3"))
    assert "'masquerade-mask/3' is not known here" in refusal(path, later, UnknownVersion)


def test_missing_and_extra_tensors(path, raw):
    missing = forge.edit(raw, lambda document: document.pop(f"{OUT}.cols"))
    assert refusal(path, missing, TensorSet).endswith(f"{OUT}.cols: is missing")
    extra = forge.edit(raw, lambda document: document.update({"x.keep": dict(document[f"{DOWN}.keep"])}))
    assert "x.keep: belongs to no module" in refusal(path, extra, TensorSet)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d[f"{DOWN}.keep"].update(dtype="F32"), TensorShape, "dtype 'F32'"),
        (lambda d: d[f"{DOWN}.keep"].update(dtype=3), TensorShape, "dtype 3"),
        (lambda d: d[f"{DOWN}.keep"].update(shape=[48, 8]), TensorShape, r"is U8 [48, 8], expected U8 [24, 16]"),
        (lambda d: d[f"{DOWN}.keep"].update(shape=[24, 4, 4]), HeaderCorrupt, "not one or two counts"),
        (lambda d: d[f"{OUT}.rows"].update(shape=[34], dtype="U16"), TensorShape, "expected I32 [17]"),
        (lambda d: d[f"{OUT}.rows"].update(shape=[True]), HeaderCorrupt, "not one or two counts"),
        (lambda d: d[f"{OUT}.rows"].update(shape=[-17]), HeaderCorrupt, "not one or two counts"),
        (lambda d: d[f"{OUT}.rows"].update(shape=[2**63]), TensorOffsets, "bytes between its offsets"),
        (lambda d: d[f"{OUT}.rows"].update(shape=[10**4200]), HeaderCorrupt, "a count above"),
        (lambda d: d[f"{OUT}.rows"].update(data_offsets=[0, 10**4200]), HeaderCorrupt, "a count above"),
        (lambda d: d[f"{OUT}.rows"].update(data_offsets=[9, 3]), TensorOffsets, "not a begin and an end"),
        (lambda d: d[f"{OUT}.rows"].update(extra=1), HeaderCorrupt, "keys"),
        (lambda d: d["__metadata__"].update(note="x"), HeaderCorrupt, "unknown ['note']"),
        (lambda d: d["__metadata__"].pop("gamma"), HeaderCorrupt, "missing ['gamma']"),
        (lambda d: d["__metadata__"].update(gamma="NaN"), HeaderCorrupt, "not a JSON number"),
        (lambda d: d["__metadata__"].update(gamma=0), HeaderCorrupt, "not strings: ['gamma']"),
        (lambda d: d["__metadata__"].update(persona='"../../x"'), HeaderCorrupt, "is not a name"),
        (lambda d: d["__metadata__"].update(modules="{}"), HeaderCorrupt, "0 modules"),
        (lambda d: d["__metadata__"].update(modules='{"a":1}'), HeaderCorrupt, "expected name: [out, in, sha256]"),
        (lambda d: d["__metadata__"].update(digest="0" * 64), DigestMismatch, "recorded digest 0000"),
        (lambda d: d["__metadata__"].update(format="pt"), NotAMask, "format is 'pt'"),
        (lambda d: d.pop("__metadata__"), NotAMask, "safetensors without masks"),
    ],
)
def test_a_forged_header_is_refused(path, raw, change, error, words):
    assert words in refusal(path, forge.edit(raw, change), error)


def test_huge_shape_is_refused(path, raw):
    huge = forge.edit_json(raw, "modules", lambda modules: modules[OUT].__setitem__(1, 1 << 40))
    assert "outside 1..1048576" in refusal(path, huge, HeaderCorrupt)


def test_gap_overlap_trailing_and_misalignment(path, raw):
    document, data = forge.split(raw)
    keep = document[f"{DOWN}.keep"]["data_offsets"]
    assert keep[0] == 0

    def shift(by):
        return forge.edit(
            raw, lambda d: d[f"{OUT}.rows"].update(data_offsets=[x + by for x in d[f"{OUT}.rows"]["data_offsets"]])
        )

    assert "leaves a gap" in refusal(path, shift(4), TensorOffsets)
    assert "overlaps the one before" in refusal(path, shift(-4), TensorOffsets)
    assert "3 bytes follow the last tensor" in refusal(path, raw + b"zip", TensorOffsets)
    assert "no multiple of 8" in refusal(path, forge.join(document, data, alignment=1), TensorOffsets)


def test_pad_bit_and_columns(path, raw):
    pad = forge.patch(raw, f"{DOWN}.keep", lambda keep: keep.__setitem__(15, 0x80))
    assert f"{DOWN}.keep: row 0 has a bit set beyond column 99" in refusal(path, pad, PadBits)
    high = forge.patch(raw, f"{OUT}.cols", lambda cols: cols.__setitem__(slice(0, 2), struct.pack("<H", 64)))
    assert f"{OUT}.cols: column 64 is out of range" in refusal(path, high, ColumnOrder)
    unsorted = forge.patch(raw, f"{OUT}.rows", lambda rows: rows.__setitem__(slice(4, 8), struct.pack("<i", -1)))
    assert f"{OUT}.rows: offset 1 is smaller" in refusal(path, unsorted, ColumnOrder)


def test_duplicate_keys_depth_and_garbage(path, raw):
    document, data = forge.split(raw)
    document["__metadata__"]["seal"] = forge.BLANK
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    twice = text.replace('"dtype":"U8"', '"dtype":"U8","dtype":"U8"', 1)
    assert "key 'dtype' appears twice" in refusal(path, forge.seal(twice) + data, HeaderCorrupt)
    deep = text.replace('"dtype":"U8"', '"dtype":' + "[" * 5000 + "]" * 5000, 1)
    assert "nested deeper than 16" in refusal(path, forge.seal(deep) + data, HeaderCorrupt)
    assert "is not JSON" in refusal(path, forge.seal(text[:-1]) + data, HeaderCorrupt)
    assert "is not ASCII" in refusal(path, forge.seal(text.replace("pirate", "pirätin")) + data, HeaderCorrupt)
    assert "not {: this is no safetensors file" in refusal(path, forge.seal(f"[{text}]") + data, NotAMask)
    assert "the limit is" in refusal(path, struct.pack("<Q", 2**63) + raw[8:], HeaderCorrupt)


def test_what_is_no_regular_file(path, raw, tmp_path):
    with pytest.raises(MaskNotFound, match="no such file"):
        read_mask(tmp_path / "absent")
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(NotAMask):
            read_mask(tmp_path / name)


def test_a_header_too_large_to_write(path):
    huge = world.mixed(parameters={str(at): "x" * 50_000 for at in range(100)})
    with pytest.raises(HeaderCorrupt, match="the header would take"):
        write_mask(huge, path)
    assert not path.exists()


def test_a_tensor_that_begins_between_items(path):
    """The order of the bytes is free, the alignment is not."""
    world.write_rows(world.mask(shapes={"a": (16, 64), "b": (16, 64)}, share=0.01), path)
    document, data = forge.split(path.read_bytes())
    spans = {name: entry["data_offsets"] for name, entry in document.items() if name != "__metadata__"}
    assert (spans["a.cols"][1] - spans["a.cols"][0]) % 4 == 2
    order, at, moved = ["a.cols", "a.rows", "b.rows", "b.cols"], 0, b""
    for name in order:
        begin, end = spans[name]
        document[name]["data_offsets"] = [at, at + end - begin]
        moved += data[begin:end]
        at += end - begin
    assert "no multiple of 4" in refusal(path, forge.join(document, moved), TensorOffsets)


def test_a_file_that_shrinks_while_it_is_read(path):
    write_mask(world.mask(share=0.5, shapes={"a": (4096, 4096)}), path)
    with MaskReader(path) as reader:
        os.truncate(path, 100_000)
        with pytest.raises(MaskTruncated, match="shrank while it was read"):
            reader.check()
