"""What a mask may say about itself: refused as a whole when it comes in, read without the faulty part if it is here."""

import json

import pytest

from maskstore import InvalidMaskValue, MaskError, Registry, Store, fsck, import_mask, read_mask, write_mask
from maskstore.errors import HeaderCorrupt
from tests.attacks.corpus import WRONG
from tests.maskstore import forge, world


def spell(field: str, value: object) -> bytes:
    """A sound file with one object of its metadata replaced, sealed again."""
    return forge.edit(
        RAW, lambda document: document["__metadata__"].update({field: json.dumps(value, separators=(",", ":"))})
    )


@pytest.fixture(scope="module", autouse=True)
def _raw(tmp_path_factory):
    global RAW
    path = tmp_path_factory.mktemp("sound") / "x"
    write_mask(world.mixed(), path)
    RAW = path.read_bytes()


@pytest.mark.parametrize("where", WRONG)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path, where):
    field, value = WRONG[where]
    with pytest.raises(InvalidMaskValue) as made:
        world.info(**{field: value})
    assert made.value.message.startswith(where)
    assert len(made.value.message) < 200
    store = Store(tmp_path / "store")
    (tmp_path / "x").write_bytes(spell(field, value))
    for work in (read_mask, lambda path: import_mask(store, path)):
        with pytest.raises(HeaderCorrupt) as caught:
            work(tmp_path / "x")
        assert caught.value.message == made.value.message
    assert store.digests() == []
    assert not any(store.quarantine().iterdir())


@pytest.mark.parametrize("where", WRONG)
def test_a_store_that_holds_such_a_mask_goes_on(tmp_path, where):
    """An older version let it in: its tensors are served, what is wrong is empty, and `fsck` says and mends it."""
    registry = Registry(tmp_path)
    digest = registry.store.add(world.mixed())
    registry.publish("pirate", digest)
    field, value = WRONG[where]
    registry.store.path(digest).write_bytes(spell(field, value))
    assert registry.store.open(digest) == world.mixed()
    assert getattr(registry.store.open(digest).info, field) == {}
    summary = registry.store.summary(digest)
    assert summary.faults[0].startswith(where)
    assert getattr(summary.info, field) == {}
    with registry.store.reader(digest) as reader:
        assert getattr(reader.info, field) == {}
    (finding,) = fsck(tmp_path).findings
    assert (finding.kind, finding.action) == ("metadata", "")
    assert finding.message.startswith(where)
    assert fsck(tmp_path, repair=True).findings[0].action
    assert fsck(tmp_path).clean
    assert registry.store.open(digest) == world.mixed()


def test_a_sound_copy_takes_the_place_of_a_faulty_one(tmp_path):
    store = Store(tmp_path)
    digest = store.add(world.mixed())
    store.path(digest).write_bytes(spell("ancestry", {"parents": []}))
    store.add(world.mixed(gamma=0.5))
    assert (store.summary(digest).faults, store.summary(digest).info.gamma) == ((), 0.5)


def test_a_damaged_copy_gives_way(tmp_path):
    store = Store(tmp_path)
    digest = store.add(world.mixed())
    store.path(digest).write_bytes(b"no mask")
    with pytest.raises(MaskError):
        store.summary(digest)
    store.add(world.mixed())
    assert store.open(digest) == world.mixed()


def test_what_nobody_reads_is_free():
    said = {"maker": "someone", "stars": [1, None, {"x": "y"}]}
    assert world.info(certificate=said, parameters=said, calibration=said, ancestry=said).certificate == said
