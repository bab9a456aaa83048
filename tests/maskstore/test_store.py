import shutil

import pytest

from maskstore import InvalidName, MaskMismatch, MaskNotFound, Store, StoreBusy
from maskstore.errors import DigestMismatch
from tests.maskstore import world


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_add_open_list(store):
    masks = [world.mask(seed) for seed in range(3)]
    digests = [store.add(mask) for mask in masks]
    assert digests == [mask.digest for mask in masks]
    assert store.digests() == sorted(digests)
    assert all(digest in store for digest in digests)
    assert [store.open(digest) for digest in digests] == masks
    assert Store(store.root).open(digests[0], base=world.BASE.fingerprint).info.persona == "pirate"


def test_equal_masks_are_kept_once(store):
    digest = store.add(world.mask())
    before = store.path(digest).read_bytes()
    assert store.add(world.mask(persona="second")) == digest
    assert store.path(digest).read_bytes() == before
    assert len(store.digests()) == 1


def test_streaming_into_the_store(store):
    mask = world.mixed()
    with store.writing(mask.base, mask.info) as writer:
        for name, target in mask.targets.items():
            writer.add(name, target)
    assert writer.digest == mask.digest
    assert store.open(mask.digest) == mask
    with store.reader(mask.digest) as reader:
        assert reader.info == mask.info
        assert dict(reader).keys() == mask.targets.keys()
    assert not any(store.quarantine().iterdir())
    with pytest.raises(ZeroDivisionError):
        _stream_and_fail(store, mask)
    assert not any(store.quarantine().iterdir())


def _stream_and_fail(store, mask):
    with store.writing(mask.base, mask.info) as writer:
        writer.add("x", 1 / 0)


def test_refusals(store):
    digest = store.add(world.mask())
    with pytest.raises(MaskMismatch):
        store.open(digest, base=world.OTHER.fingerprint)
    with pytest.raises(MaskNotFound, match="no mask ffffffffffffffff"):
        store.open("f" * 64)
    for name in ("", "../x", digest[:8], digest.upper(), digest + "\n"):
        with pytest.raises(InvalidName):
            store.path(name)


def test_a_file_under_a_wrong_name(store):
    one, two = store.add(world.mask(1)), store.add(world.mask(2))
    shutil.copy(store.path(one), store.path(two))
    with pytest.raises(DigestMismatch, match="not the one it is named after"):
        store.open(two)


def test_a_store_that_stays_locked(store, monkeypatch):
    monkeypatch.setattr("maskstore.store.TIMEOUT", 0.05)
    with store.lock(), store.lock(), pytest.raises(StoreBusy, match="locked by another"), store.lock(exclusive=True):
        raise AssertionError
    with store.lock(exclusive=True), pytest.raises(StoreBusy):
        store.add(world.mask())
    store.add(world.mask())


def test_reader_of_nothing(store):
    with pytest.raises(MaskNotFound, match="no mask"):
        store.reader("a" * 64)
