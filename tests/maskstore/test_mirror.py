"""Stores of several machines on one bucket: folders of different parents stand for machines."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskstore import BucketUnreachable, InvalidMaskValue, MaskConflict, MaskNotFound, Registry, StoreBusy, fsck, gc
from maskstore.bucket import S3Bucket, VersionConflict
from maskstore.errors import DigestMismatch, MaskCorrupt
from maskstore.mirror import LEASE, find_bucket, name_folder
from tests import s3
from tests.maskstore import world

SEEN_SECONDS = 2.0  # within which a change on one machine counts on all


@pytest.fixture(scope="module")
def service() -> Iterator[s3.Service]:
    with s3.serving() as running:
        yield running


@pytest.fixture
def url(service: s3.Service, request: pytest.FixtureRequest) -> str:
    return service.make_bucket(f"b{abs(hash(request.node.name))}") + "/some/where"


def machine(tmp_path: Path, name: str, url: str) -> Registry:
    return Registry(tmp_path / name / name_folder(url))


def wait_for(true) -> float:
    started = time.monotonic()
    while not true():
        assert time.monotonic() < started + 30
        time.sleep(0.02)
    return time.monotonic() - started


def test_the_folder_of_a_bucket() -> None:
    assert find_bucket(Path("/data/introverts")) is None
    assert find_bucket(Path("/data/s3:")) is None
    assert find_bucket(Path("/data") / name_folder("s3://bucket/a/b/")).url == "s3://bucket/a/b"


def test_what_a_machine_publishes_every_machine_has(tmp_path: Path, url: str) -> None:
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    mask = world.mask(1, persona="pirate")
    watch, seen = theirs.watch(), theirs.watch().look()
    watch.look()
    (made,) = ours.publish_built(mask)
    assert wait_for(lambda: theirs.names() == [made]) < SEEN_SECONDS
    assert watch.look() != seen
    assert [one.quantization for one in theirs.measurements(mask.digest)] == [None]
    opened = theirs.store.open(mask.digest)
    assert (opened.digest, opened.info) == (mask.digest, mask.info)
    ours.remove("pirate")
    assert wait_for(lambda: theirs.names() == []) < SEEN_SECONDS
    watch.close()


def test_a_machine_with_an_older_copy_does_not_replace_a_signed_one(tmp_path: Path, url: str) -> None:
    signing = pytest.importorskip("maskstore.signing")
    pytest.importorskip("cryptography")
    private, public = signing.generate()
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    for registry in (ours, theirs):
        registry.store.keys.trust(public, "me")
    digest = theirs.store.add(world.mask(1))
    ours.store.add(signing.sign(world.mask(1), private))
    theirs.store.add(world.mask(1))
    later = machine(tmp_path, "c", url)
    for registry in (ours, theirs, later):
        assert registry.store.open(digest).signature


def test_a_machine_that_comes_later_has_it_at_once(tmp_path: Path, url: str) -> None:
    ours = machine(tmp_path, "a", url)
    assert ours.database.is_new
    ours.publish("pirate", ours.store.add(world.mask(1)))
    theirs = machine(tmp_path, "b", url)
    assert not theirs.database.is_new
    assert theirs.names() == ours.names()


PUBLISH = """
import sys
from pathlib import Path
from maskstore import MaskConflict, Registry
from tests.maskstore import world
root, machine, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
registry = Registry(root)
for number in range(count):
    mask = world.mask(number)
    registry.publish(f"{machine}-{number}", registry.store.add(mask))
try:
    registry.publish("wanted", mask.digest, expected=None)
    print("won")
except MaskConflict:
    print("lost")
"""


def test_machines_that_write_at_once_lose_nothing(tmp_path: Path, url: str) -> None:
    roots = [tmp_path / name / name_folder(url) for name in "abc"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, root, root.parent.name, "3"], stdout=subprocess.PIPE, text=True
        )
        for root in roots
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    names = [revision.name for revision in machine(tmp_path, "d", url).names()]
    assert names == sorted([f"{root.parent.name}-{number}" for root in roots for number in range(3)] + ["wanted"])
    assert sorted(said) == ["lost", "lost", "won"] or said.count("won") == 3  # the same digest is no conflict


def test_of_two_machines_one_wins_a_name(tmp_path: Path, url: str) -> None:
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    ours.publish("pirate", ours.store.add(world.mask(1)), expected=None)
    with pytest.raises(MaskConflict):
        theirs.publish("pirate", theirs.store.add(world.mask(2)), expected=None)


HANG = """
import sys, time
from pathlib import Path
from maskstore import Registry
registry = Registry(Path(sys.argv[1]))
with registry.database.write() as db:
    db.execute("insert into persona values ('half', 1, null, '')")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_machine_that_dies_in_a_write_leaves_the_old_registry_and_a_lock_that_is_taken_over(
    tmp_path: Path, url: str
) -> None:
    ours = machine(tmp_path, "a", url)
    made = ours.publish("pirate", ours.store.add(world.mask(1)))
    root = tmp_path / "b" / name_folder(url)
    process = subprocess.Popen([sys.executable, "-c", HANG, root], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert ours.names() == [made]
    started = time.monotonic()
    ours.change("pirate", tags=lambda old: {*old, "sea"})
    assert time.monotonic() - started < LEASE + 5
    again = Registry(root)  # the machine that died
    assert again.names() == [made]
    assert again.describe("pirate").tags == ("sea",)
    again.change("pirate", tags=lambda old: old - {"sea"})
    process.stdout.close()


def test_a_write_that_takes_longer_than_the_lease_keeps_the_lock(tmp_path: Path, url: str, monkeypatch) -> None:
    monkeypatch.setattr("maskstore.mirror.LEASE", 0.4)
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    digest = ours.store.add(world.mask(1))
    order = []

    def write_slowly() -> None:
        with ours.database.write():
            order.append("in")
            time.sleep(2)
            order.append("out")

    thread = threading.Thread(target=write_slowly)
    thread.start()
    wait_for(lambda: order)
    theirs.publish("pirate", digest)
    assert order == ["in", "out"]
    thread.join()


def test_without_the_lock_the_condition_decides(tmp_path: Path, url: str) -> None:
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    digest = ours.store.add(world.mask(1))

    def write_without_lock() -> None:
        with ours.database.write() as db:
            db.execute("insert into pin values ('0')")
            S3Bucket(url).delete("registry.lock")
            theirs.publish("pirate", digest)

    with pytest.raises(StoreBusy, match="another machine changed the registry"):
        write_without_lock()
    assert ours.pins() == frozenset()
    ours.database.refresh()
    assert [revision.name for revision in ours.names()] == ["pirate"]


def test_an_exception_in_a_write_changes_nothing(tmp_path: Path, url: str) -> None:
    ours = machine(tmp_path, "a", url)
    version = S3Bucket(url).version("registry.sqlite")
    with pytest.raises(MaskNotFound):
        ours.publish("pirate", "a" * 64)
    assert (ours.names(), S3Bucket(url).version("registry.sqlite")) == ([], version)
    assert S3Bucket(url).version("registry.lock") is None


def test_only_what_the_bucket_has_can_be_published(tmp_path: Path, url: str) -> None:
    ours = machine(tmp_path, "a", url)
    digest = ours.store.add(world.mask(1))
    S3Bucket(url).delete(f"masks/{digest[:2]}/{digest}.safetensors")
    with pytest.raises(MaskNotFound):
        ours.publish("pirate", digest)


def test_a_damaged_object_is_not_taken_in(tmp_path: Path, url: str) -> None:
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    first, second = (ours.store.add(world.mask(seed)) for seed in (1, 2))
    name = f"masks/{first[:2]}/{first}.safetensors"
    S3Bucket(url).upload(ours.store.path(second), name)
    with pytest.raises(DigestMismatch, match=f"holds the mask {second[:16]}"):
        theirs.store.open(first)
    cut = tmp_path / "cut"
    cut.write_bytes(ours.store.path(first).read_bytes()[:-1])
    S3Bucket(url).upload(cut, name)
    with pytest.raises(MaskCorrupt):
        theirs.store.open(first)
    assert not theirs.store.path(first).exists()
    assert list(theirs.store.quarantine().iterdir()) == []


def test_upkeep(tmp_path: Path, url: str) -> None:
    ours, theirs = machine(tmp_path, "a", url), machine(tmp_path, "b", url)
    named, unnamed = (ours.store.add(world.mask(seed)) for seed in (1, 2))
    ours.publish("pirate", named)
    assert gc(theirs.store.root).digests == ()  # too young
    assert gc(theirs.store.root, grace=-5).digests == (unnamed,)
    assert ours.store.ages().keys() == {named, unnamed}  # our copy, which nothing refers to
    assert unnamed not in ours.store
    assert gc(ours.store.root, grace=-5).digests == (unnamed,)
    assert ours.store.digests() == [named]
    assert not theirs.store.path(named).exists()
    checkup = fsck(theirs.store.root)
    assert (checkup.masks, checkup.clean) == (1, True)
    with pytest.raises(InvalidMaskValue, match="delete the folder"):
        fsck(theirs.store.root, repair=True)


def test_gc_deletes_nothing_under_a_lock_that_it_may_have_lost(tmp_path: Path, url: str, monkeypatch) -> None:
    ours = machine(tmp_path, "a", url)
    unnamed = ours.store.add(world.mask(2))
    monkeypatch.setattr("maskstore.mirror.LEASE", 0.0)
    with pytest.raises(StoreBusy, match="could not be renewed in time"):
        gc(ours.store.root, grace=-5)
    assert unnamed in ours.store


@pytest.mark.parametrize(
    ("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict"), (412, "412")]
)
def test_conflicts_are_known_by_their_codes(url: str, monkeypatch, status: int, code: str) -> None:
    """Not by the words that a service says with them."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    bucket = S3Bucket(url)
    bucket.write("x", b"theirs", None)
    error = ClientError(
        {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )
    call = bucket._service.call_s3

    def refuse(name: str, **given: object) -> object:
        if name == "put_object":
            raise translate_boto_error(error)
        return call(name, **given)

    monkeypatch.setattr(bucket._service, "call_s3", refuse)
    with pytest.raises(VersionConflict):
        bucket.write("x", b"ours", None)
    assert bucket.write("x", b"theirs", None) == bucket.version("x")  # the response to that write was lost


def test_a_bucket_that_is_not_there(tmp_path: Path, service: s3.Service) -> None:
    with pytest.raises(BucketUnreachable, match="s3://nowhere"):
        machine(tmp_path, "a", "s3://nowhere")


def test_an_unreachable_bucket(tmp_path: Path, caplog) -> None:
    with s3.serving() as service:
        url = service.make_bucket("lonely")
        ours = machine(tmp_path, "a", url)
        made = ours.publish("pirate", ours.store.add(world.mask(1)))
        watch = ours.watch()
        watch.look()
        service.stop()
        wait_for(lambda: "personas stay as they were" in caplog.text)
        assert ours.names() == [made]
        assert ours.store.open(made.digest).digest == made.digest
        with pytest.raises(BucketUnreachable, match="s3://lonely") as caught:
            ours.remove("pirate")
        assert "secret-of-the-bucket" not in f"{caught.value} {caplog.text}"
        with pytest.raises(BucketUnreachable):
            machine(tmp_path, "b", url)
        watch.close()
