import errno
import os
import shutil
import sqlite3
import threading
import time
from contextlib import closing

import pytest

from maskstore import Registry, StoreBusy, UnknownVersion, database, fsck, gc, sweep
from tests.maskstore import forge, world


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path)


@pytest.fixture
def digests(registry):
    return [
        registry.store.add(world.mask(seed, persona=f"p{seed}", created_at=f"2026-01-0{seed + 1}")) for seed in range(5)
    ]


def kinds(checkup):
    return [(finding.kind, finding.subject) for finding in checkup.findings]


def test_gc_takes_only_what_nothing_refers_to(registry, digests):
    root = registry.store.root
    registry.publish("pirate", digests[0])
    registry.publish("pirate", digests[1])
    registry.rollback("pirate")
    registry.publish("monk", digests[2])
    registry.alias("calm", "monk")
    registry.pin(digests[3])
    size = registry.store.path(digests[4]).stat().st_size
    dry = gc(root, dry=True, grace=0)
    assert (dry.digests, dry.nbytes, dry.dry) == ((digests[4],), size, True)
    assert len(registry.store.digests()) == 5
    assert gc(root, grace=0).digests == (digests[4],)
    assert registry.store.digests() == sorted(digests[:4])
    registry.remove("monk")
    registry.unpin(digests[3])
    registry.trim("pirate", keep=0)
    assert set(gc(root, grace=0).digests) == {digests[1], digests[2], digests[3]}
    assert fsck(root).clean


def test_gc_leaves_the_young(registry, digests):
    root = registry.store.root
    old = time.time() - 7200
    for digest in digests[:2]:
        os.utime(registry.store.path(digest), (old, old))
    registry.store.add(world.mask(0, persona="p0"))  # adding again makes it young again
    assert gc(root).digests == (digests[1],)


def test_a_sweep_removes_old_leftovers_and_nothing_else(registry, digests):
    store = registry.store
    seat = store.path(digests[0])
    old, young = seat.with_name(f".{seat.name}.1.abc.tmp"), store.quarantine() / "upload-young"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert sweep(store.root) == (old.relative_to(store.root).as_posix(),)
    assert (old.exists(), young.exists()) == (False, True)
    assert len(store.digests()) == 5


def test_gc_removes_leftovers(registry, digests):
    root = registry.store.root
    stale = registry.store.path(digests[0]).with_name(".x.safetensors.1.abcd.tmp")
    stale.write_bytes(b"12345")
    assert fsck(root).leftovers == (stale.relative_to(root).as_posix(),)
    assert fsck(root).clean
    assert gc(root).leftovers == ()
    assert gc(root, grace=-1).leftovers == (stale.relative_to(root).as_posix(),)
    assert not stale.exists()


def test_fsck_of_a_sound_store(registry, digests):
    registry.publish("pirate", digests[0])
    checkup = fsck(registry.store.root)
    assert checkup.clean
    assert checkup.masks == 5


def test_fsck_of_nothing(tmp_path):
    assert fsck(tmp_path / "new").clean


def test_fsck_finds_and_sets_aside_damage(registry, digests):
    root, store = registry.store.root, registry.store
    registry.publish("pirate", digests[0])
    raw = bytearray(store.path(digests[0]).read_bytes())
    raw[-1] ^= 1
    store.path(digests[0]).write_bytes(raw)
    store.path(digests[1]).write_bytes(b"")
    (store.masks / "readme.txt").write_text("hello")
    (store.masks / "link").symlink_to(store.path(digests[2]))
    relative = {digest: store.path(digest).relative_to(root).as_posix() for digest in digests}
    expected = {
        ("damaged", relative[digests[0]]),
        ("damaged", relative[digests[1]]),
        ("damaged", "masks/readme.txt"),
        ("damaged", "masks/link"),
        ("dangling", "pirate generation 1"),
    }
    assert set(kinds(fsck(root))) == expected
    assert set(kinds(fsck(root, repair=True))) == expected
    assert kinds(fsck(root)) == [("dangling", "pirate generation 1")]
    assert len(list((root / "damaged").iterdir())) == 4
    store.add(world.mask(0))
    assert fsck(root).clean


@pytest.mark.parametrize("damage", [False, True])
def test_fsck_does_not_replace_a_sound_mask_by_a_second_copy(registry, digests, damage):
    signing = pytest.importorskip("maskstore.signing")
    pytest.importorskip("cryptography")
    private, public = signing.generate()
    store, digest = registry.store, digests[0]
    store.keys.trust(public, "me")
    path = store.path(digest)
    shutil.copyfile(path, path.with_name(f"{path.name}.bak"))
    store.add(signing.sign(store.open(digest), private))
    if damage:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    fsck(store.root, repair=True)
    assert (store.open(digest).signature is None) is damage
    assert fsck(store.root).clean


def test_fsck_puts_misplaced_masks_right(registry, digests):
    root, store = registry.store.root, registry.store
    registry.publish("pirate", digests[0])
    os.replace(store.path(digests[0]), store.masks / "x.safetensors")
    found = kinds(fsck(root))
    assert {kind for kind, _ in found} == {"misplaced", "dangling"}
    fsck(root, repair=True)
    assert fsck(root).clean
    assert store.open(digests[0]).digest == digests[0]


def test_a_mask_under_the_name_of_another(registry, digests):
    store = registry.store
    registry.publish("pirate", digests[0])
    shutil.copy(store.path(digests[1]), store.path(digests[0]))
    assert {kind for kind, _ in kinds(fsck(store.root))} == {"misplaced", "dangling"}


@pytest.mark.parametrize("harm", ["garbage", "missing", "rows"])
def test_the_registry_is_rebuilt_from_the_masks(registry, digests, harm):
    root = registry.store.root
    registry.publish("p0", digests[0])
    if harm == "garbage":
        registry.path.write_bytes(b"garbage" * 1000)
        registry.path.with_name("registry.sqlite-journal").write_bytes(b"hot")
    elif harm == "missing":
        registry.path.unlink()
    else:
        with sqlite3.connect(registry.path) as db:
            db.execute("update persona set current = 7")
        db.close()
    assert [kind for kind, _ in kinds(fsck(root))] == ["registry"]
    actions = [finding.action for finding in fsck(root, repair=True).findings]
    assert "rebuilt 5 personas from 5 masks" in actions[0]
    assert fsck(root).clean
    assert [item.name for item in Registry(root).names()] == [f"p{seed}" for seed in range(5)]


def test_what_cannot_be_read_is_left_alone(registry, digests, monkeypatch):
    sound = os.open
    closed = registry.store.path(digests[0])

    def refuse(path, *rest):
        if path == closed:
            raise OSError(errno.EMFILE, "Too many open files")
        return sound(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    found = fsck(registry.store.root, repair=True).findings
    assert [(finding.kind, finding.action) for finding in found] == [("unreadable", "")]
    assert closed.exists()


def test_masks_of_a_newer_format_are_left_alone(registry, digests):
    path = registry.store.path(digests[0])
    newer = forge.edit(path.read_bytes(), lambda document: document["__metadata__"].update(format="masquerade-mask/9"))
    path.write_bytes(newer)
    found = fsck(registry.store.root, repair=True).findings
    assert [(finding.kind, finding.action) for finding in found] == [("unreadable", "")]
    assert path.read_bytes() == newer


@pytest.mark.parametrize("obstacle", ["newer", "held"])
def test_a_sound_registry_that_cannot_be_read_now_is_left_alone(registry, digests, obstacle, monkeypatch):
    registry.publish("pirate", digests[0])
    registry.alias("bold", "pirate")
    monkeypatch.setattr(database, "TIMEOUT", 0.1)
    with closing(sqlite3.connect(registry.path, isolation_level=None)) as db:
        db.execute("pragma user_version = 99" if obstacle == "newer" else "begin exclusive")
        with pytest.raises(UnknownVersion if obstacle == "newer" else StoreBusy):
            fsck(registry.store.root, repair=True)
    assert not (registry.store.root / "damaged").exists()
    if obstacle == "held":
        assert Registry(registry.store.root).aliases() == {"bold": "pirate"}


def test_a_registry_without_its_tables_is_rebuilt(registry, digests):
    with closing(sqlite3.connect(registry.path, isolation_level=None)) as db:
        db.execute("drop table tag")
        db.execute("drop table alias")
        db.execute("drop table generation")
    assert "rebuilt 5 personas" in fsck(registry.store.root, repair=True).findings[0].action


def test_imports_come_and_go_while_leftovers_are_looked_for(registry):
    """What is in quarantine is in no lock, so a file may go between being listed and being looked at."""
    folder, over = registry.store.quarantine(), threading.Event()

    def upload(name):
        while not over.is_set():
            (folder / name).touch()
            (folder / name).unlink()

    threads = [threading.Thread(target=upload, args=(f"upload-{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            sweep(registry.store.root)
            gc(registry.store.root)
    finally:
        over.set()
        for thread in threads:
            thread.join()
