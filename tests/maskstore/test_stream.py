import os

import numpy as np
import pytest

from maskstore import MaskExists, MaskMismatch, MaskNotFound, MaskReader, MaskWriter, read_mask, write_mask
from maskstore.errors import GapsCorrupt
from tests.maskstore import world

NAMES = tuple(sorted(world.SHAPES))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_the_stream_writes_the_same_bytes(path, tmp_path, order):
    mask = world.mixed()
    with MaskWriter(path, mask.base, mask.info) as writer:
        for name in order:
            writer.add(name, mask.targets[name])
    write_mask(mask, tmp_path / "whole")
    assert writer.digest == mask.digest
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_reading_one_module_at_a_time(path):
    mask = world.mixed()
    write_mask(mask, path)
    with MaskReader(path, base=mask.base.fingerprint) as reader:
        assert (reader.base, reader.info, reader.digest, reader.names) == (mask.base, mask.info, mask.digest, NAMES)
        for name, target in reader:
            assert np.array_equal(target.to_keep(), mask.targets[name].to_keep())
        with pytest.raises(MaskNotFound, match="nowhere: no such module"):
            reader["nowhere"]
        kept = reader[NAMES[0]]
    assert kept.pruned == mask.targets[NAMES[0]].pruned  # a target outlives its reader


def test_only_the_damaged_module_is_refused(path):
    mask = world.mixed()
    write_mask(mask, path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with MaskReader(path) as reader:
        bad = [name for name in NAMES if _refused(reader, name)]
        assert bad == ["model.layers.0.self_attn.o_proj"]
        with pytest.raises(GapsCorrupt):
            reader.check()
    with pytest.raises(GapsCorrupt):
        read_mask(path)


def _refused(reader, name):
    try:
        reader[name]
    except GapsCorrupt:
        return True
    return False


def test_a_failed_stream_leaves_nothing(path):
    with pytest.raises(MaskExists, match="was added before"):
        _add_twice(path, world.mixed())
    assert os.listdir(path.parent) == []


def _add_twice(path, mask):
    with MaskWriter(path, mask.base, mask.info) as writer:
        writer.add(NAMES[0], mask.targets[NAMES[0]])
        writer.add(NAMES[0], mask.targets[NAMES[0]])


def test_another_base_is_refused_at_once(path):
    write_mask(world.mixed(), path)
    with pytest.raises(MaskMismatch, match="the base here is"):
        MaskReader(path, base=world.OTHER.fingerprint)
