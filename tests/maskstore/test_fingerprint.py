import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from maskstore import MaskError, MaskNotFound, fingerprint
from maskstore.errors import HeaderCorrupt, TensorSet


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.random((8, 8), np.float32),
        "b.weight": rng.random((300, 100), np.float32),
        "c": np.ones(3, np.float16),
    }


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder, index):
    folder.mkdir()
    names = {"a.weight": "x-00002.safetensors", "b.weight": "x-00001.safetensors", "c": "x-00002.safetensors"}
    for file in set(names.values()):
        save_file({name: tensors()[name] for name, place in names.items() if place == file}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        save_file({"stray": np.ones(1)}, folder / "adapter.safetensors")
    return folder


def test_does_not_depend_on_shards(whole, tmp_path):
    expected = fingerprint(whole)
    assert len(expected) == 64
    assert fingerprint(shard(tmp_path / "shards", index=False)) == expected
    assert fingerprint(shard(tmp_path / "indexed", index=True)) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["a.weight"].__setitem__((0, 0), 7),
        lambda t: t["b.weight"].__setitem__((0, 0), 7),
        lambda t: t["b.weight"].__setitem__((-1, -1), 7),
        lambda t: t.update(c=np.ones(4, np.float16)),
        lambda t: t.update(c=np.ones((3, 1), np.float16)),
        lambda t: t.update(c=t["c"].view(np.int16)),
        lambda t: t.update(d=t.pop("c")),
    ],
)
def test_depends_on_content(whole, change):
    before, changed = fingerprint(whole), tensors()
    change(changed)
    save_file(changed, whole / "model.safetensors")
    assert fingerprint(whole) != before


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(MaskNotFound, match="no base model"):
        fingerprint(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({"a": np.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TensorSet, match=r"a: is in one.safetensors and in two.safetensors"):
        fingerprint(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x" * 7,
        b"\xff" * 20,
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x02" + b"\0" * 7 + b"{",
        b'\x0b\0\0\0\0\0\0\0{"a":{"b":1}}',
    ],
)
def test_damaged_models_are_typed_errors(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(MaskError):
        fingerprint(tmp_path)


@pytest.mark.parametrize(
    "index", ["", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}']
)
def test_damaged_index(whole, index):
    (whole / "model.safetensors.index.json").write_text(index)
    with pytest.raises(HeaderCorrupt):
        fingerprint(whole)


def test_missing_shard(whole):
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(MaskNotFound, match=r"first gone.safetensors"):
        fingerprint(whole)
