"""Every hostile file is refused with its own error, within a second and 50 MB, by reading and by importing."""

import time
from pathlib import Path

import pytest

from maskstore import MaskError, MaskReader, Store, import_mask, read_mask
from tests.attacks.corpus import Attack, attacks, sound

CORPUS = list(attacks())
CLEAR = Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def test_the_corpus_is_large_and_its_origin_sound(tmp_path):
    assert len(CORPUS) >= 60
    assert len({attack.name for attack in CORPUS}) == len(CORPUS)
    (tmp_path / "m").write_bytes(sound())
    assert read_mask(tmp_path / "m").pruned


@pytest.mark.parametrize("attack", CORPUS, ids=[attack.name for attack in CORPUS])
def test_refused(tmp_path, attack: Attack):
    path = attack.write(tmp_path)
    before, started = resident("VmRSS"), time.process_time()
    CLEAR.write_text("5")
    with pytest.raises(MaskError) as caught:
        read_mask(path)
    assert time.process_time() - started < 1
    assert resident("VmHWM") - before < 50e6
    assert type(caught.value) is attack.error, caught.value
    assert caught.value.path == path
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("attack", CORPUS[::7], ids=[attack.name for attack in CORPUS[::7]])
def test_not_imported_and_not_streamed(tmp_path, attack: Attack):
    path = attack.write(tmp_path)
    store = Store(tmp_path / "store")
    with pytest.raises(MaskError):
        import_mask(store, path)
    assert store.digests() == []
    assert not any((store.root / "quarantine").iterdir())
    with pytest.raises(MaskError):
        _stream(path)


def _stream(path: Path) -> None:
    with MaskReader(path) as reader:
        reader.check()
