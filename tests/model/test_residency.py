"""Loading and evicting masks: shared loads, waiting, eviction and failures."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskstore import Mask, MaskMismatch, MaskNotFound, Store
from maskstore.errors import DigestMismatch
from masquerade.errors import MaskTooLarge, NotReady, Overloaded
from masquerade.model import Base, HostCache, MaskManager, Residency, VerifiedStore
from tests import world

SECONDS = 30.0  # a wait that means "never"
Make = Callable[..., Residency]


class Doors(VerifiedStore):
    """A store that records its reads and can delay each mask."""

    def __init__(self, store: Store, base: str) -> None:
        super().__init__(store, base)
        self.reads: list[str] = []
        self.closed: dict[str, threading.Event] = {}

    def close(self, digest: str) -> threading.Event:
        self.closed[digest] = threading.Event()
        return self.closed[digest]

    def read(self, digest: str) -> Mask:
        self.reads.append(digest)
        if digest in self.closed:
            assert self.closed[digest].wait(SECONDS)
        return super().read(digest)


@pytest.fixture
def masks(tiny: Base) -> list[Mask]:
    """Four of equal size: bitmaps."""
    return [world.make_mask(tiny, 0.3, seed) for seed in range(4)]


@pytest.fixture
def store(tmp_path: Path, masks: list[Mask]) -> Store:
    store = Store(tmp_path)
    for mask in masks:
        store.add(mask)
    return store


@pytest.fixture
def verified_store(store: Store, tiny: Base) -> Doors:
    return Doors(store, tiny.fingerprint)


@pytest.fixture
def make(manager: MaskManager, verified_store: Doors, masks: list[Mask]) -> Iterator[Make]:
    """A residency with room for so many of the masks."""
    made: list[Residency] = []

    def make(room: float, **options: object) -> Residency:
        made.append(Residency(manager, verified_store, int(room * manager.fit(masks[0]).nbytes), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for door in verified_store.closed.values():
        door.set()
    for residency in made:
        residency.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_capacity_is_estimated_from_the_masks_that_are_known(make: Make, masks: list[Mask]) -> None:
    residency = make(3.5)
    assert residency.estimate_capacity(residency.budget // 2) == 2  # of the largest, before the first
    assert residency.estimate_capacity(2 * residency.budget) == 1
    users = [residency.get(mask.digest) for mask in masks[:3]]
    assert residency.estimate_capacity(residency.budget) == len(users) == 3
    residency.budget = 1
    assert residency.estimate_capacity(1) == 3  # never fewer than there are


@pytest.mark.parametrize("rho", [0.003, 0.3])
def test_bytes_are_known_before_anything_is_read(tiny: Base, manager: MaskManager, tmp_path: Path, rho: float) -> None:
    mask = world.make_mask(tiny, rho, 9)
    store = Store(tmp_path)
    with VerifiedStore(store, tiny.fingerprint).open(store.add(mask)) as reader:
        assert manager.measure(reader) == manager.fit(mask).nbytes > 0


def test_a_mask_is_read_once_and_found_afterwards(make: Make, verified_store: Doors, masks: list[Mask]) -> None:
    residency, digest = make(4), masks[0].digest
    assert residency.tier(digest) == "disk"
    first = residency.get(digest)
    assert residency.get(digest) is first
    assert verified_store.reads == [digest]
    assert (digest in residency, residency.tier(digest), residency.nbytes) == (True, "device", first.nbytes)
    assert (residency.loads.misses, residency.loads.done, residency.loads.hits) == (1, 1, 1)


def test_who_asks_for_one_mask_shares_one_load(make: Make, verified_store: Doors, masks: list[Mask]) -> None:
    residency, digest = make(4), masks[0].digest
    door = verified_store.close(digest)
    futures = [residency.request(digest) for _ in range(20)]
    assert (residency.waiting, residency.tier(digest)) == (20, "loading")
    assert futures.pop().cancel()
    door.set()
    assert len({id(future.result(SECONDS)) for future in futures}) == 1  # it is their load, too
    assert (verified_store.reads, residency.loads.misses, residency.loads.shared, residency.waiting) == (
        [digest],
        1,
        19,
        0,
    )


def test_closing_ends_every_load_that_waits_for_room(
    manager: MaskManager, verified_store: Doors, masks: list[Mask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: more than Python has frames."""
    count = sys.getrecursionlimit()
    small = Residency(manager, verified_store, manager.fit(masks[0]).nbytes, waiting=2 * count)
    user = small.get(masks[0].digest)
    monkeypatch.setattr(small, "_measure", lambda _: user.nbytes)
    monkeypatch.setattr(small, "_fetch", lambda _: None)
    futures = [small.request(f"{number:064x}") for number in range(count)]
    until(lambda: len(small._ready) == count)
    small.close()
    assert all(isinstance(future.exception(SECONDS), NotReady) for future in futures)
    assert small.waiting == 0


def test_evicted_masks_leave_nothing(make: Make, masks: list[Mask]) -> None:
    """Not even the notes of what left, which only a load without room used to read."""
    residency = make(1)
    for _ in range(3):
        for mask in masks:
            residency.get(mask.digest)
    until(residency._freed.empty)
    assert residency.loads.evictions == 3 * len(masks) - 1


def test_nobody_waits_for_the_load_of_another(make: Make, verified_store: Doors, masks: list[Mask]) -> None:
    residency = make(4)
    slow, here, cold, colder = (mask.digest for mask in masks)
    residency.get(here)
    door = verified_store.close(slow)
    waiting = residency.request(slow)
    assert residency.request(here).done()
    for digest in (cold, colder):
        residency.request(digest).result(SECONDS)
    assert not waiting.done()
    door.set()
    waiting.result(SECONDS)


def test_the_least_recently_used_goes_first(make: Make, masks: list[Mask]) -> None:
    residency = make(2)
    one, two, three, _ = (mask.digest for mask in masks)
    for digest in (one, two, one, three):
        residency.get(digest)
    assert [digest in residency for digest in (one, two, three)] == [True, False, True]
    assert residency.loads.evictions == 1
    assert residency.nbytes <= residency.budget


def test_masks_in_use_stay_and_count(make: Make, masks: list[Mask]) -> None:
    residency = make(2)
    one, two, three, _ = (mask.digest for mask in masks)
    resident = residency.get(one)
    for digest in (two, three, two):
        residency.get(digest)
    assert one in residency  # though two others were used after it
    assert residency.get(one) is resident
    assert residency.nbytes == residency.budget


def test_without_room_a_load_waits_until_a_mask_is_unused(make: Make, masks: list[Mask]) -> None:
    residency = make(2)
    one, two, three, _ = (mask.digest for mask in masks)
    held = [residency.get(one), residency.get(two)]
    waiting = residency.request(three)
    until(lambda: residency.evicting > 0)
    assert not waiting.done()
    assert residency.nbytes == residency.budget
    held.pop(0)
    waiting.result(SECONDS)
    assert [digest in residency for digest in (one, two, three)] == [False, True, True]


def test_a_mask_in_steady_use_does_not_starve_the_others(make: Make, masks: list[Mask]) -> None:
    """Later requests for a mask in use queue behind the load that waits for its room."""
    residency = make(1)
    popular, rare = masks[0].digest, masks[1].digest
    held = residency.get(popular)
    waiting = residency.request(rare)
    until(lambda: residency.evicting > 0)
    late = residency.request(popular)
    assert not late.done()
    until(lambda: len(residency._ready) == 2)
    del held
    assert waiting.result(SECONDS).digest == rare
    assert not late.done()
    del waiting
    assert late.result(SECONDS).digest == popular


def test_a_mask_that_was_to_leave_stays_if_its_room_is_not_needed_after_all(
    make: Make, verified_store: Doors, masks: list[Mask]
) -> None:
    residency = make(2)
    one, two, three, _ = (mask.digest for mask in masks)
    held = [residency.get(one), residency.get(two)]
    waiting = residency.request(three)
    until(lambda: residency.evicting > 0)
    again = residency.request(one)  # behind three
    held.pop(1)  # two is not in use any more, but one was marked
    held.pop(0)
    waiting.result(SECONDS)
    assert again.result(SECONDS).digest == one
    until(lambda: residency.evicting == 0)


def test_a_mask_that_can_never_fit_is_refused_before_it_is_read(
    make: Make, verified_store: Doors, masks: list[Mask]
) -> None:
    residency = make(0.9)
    with pytest.raises(MaskTooLarge, match="--mask-bytes"):
        residency.get(masks[0].digest)
    with pytest.raises(MaskTooLarge):
        residency.prefetch(masks[0].digest)
    assert verified_store.reads == []


def test_a_load_that_fails_touches_nobody_and_is_tried_again(make: Make, store: Store, masks: list[Mask]) -> None:
    residency = make(4)
    good, bad = masks[0].digest, masks[1].digest
    held = residency.get(good)
    path = store.path(bad)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            residency.get(bad)
    assert residency.get(good) is held
    assert (residency.nbytes, residency.loads.failed, residency.waiting) == (held.nbytes, 2, 0)
    path.write_bytes(whole)
    assert residency.get(bad).digest == bad


def test_a_fit_that_fails_gives_its_room_back(
    make: Make, manager: MaskManager, masks: list[Mask], monkeypatch: pytest.MonkeyPatch
) -> None:
    residency = make(1)
    with monkeypatch.context() as broken:
        broken.setattr(manager, "fit", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            residency.get(masks[0].digest)
    assert residency.nbytes == 0
    assert residency.get(masks[0].digest).nbytes == residency.nbytes


def test_a_mask_of_another_base_and_one_that_is_not_there(make: Make, tiny: Base, store: Store) -> None:
    stranger = world.make_mask(tiny, 0.1, 7)
    object.__setattr__(stranger, "base", type(stranger.base)("0" * 64, "another"))
    with pytest.raises(MaskMismatch):
        make(4).get(store.add(stranger))
    with pytest.raises(MaskNotFound):
        make(4).get("0" * 64)


def test_too_many_who_wait_are_refused(make: Make, verified_store: Doors, masks: list[Mask]) -> None:
    residency = make(4, waiting=2)
    slow, other = masks[0].digest, masks[1].digest
    door = verified_store.close(slow)
    futures = [residency.request(slow) for _ in range(2)]
    with pytest.raises(Overloaded):
        residency.request(other)
    residency.prefetch(other)  # nobody waits for it, so nothing happens
    door.set()
    for future in futures:
        future.result(SECONDS)
    assert residency.get(other).digest == other


def test_who_gives_up_does_not_count(make: Make, verified_store: Doors, masks: list[Mask]) -> None:
    residency = make(4, waiting=2)
    slow, other = masks[0].digest, masks[1].digest
    verified_store.close(slow)
    for _ in range(3):
        impatient = [residency.request(slow) for _ in range(2)]
        with pytest.raises(Overloaded):
            residency.request(other)
        assert all(future.cancel() for future in impatient)
        assert residency.waiting == 0
    assert residency.request(other).result(SECONDS).digest == other
    late = residency.request(slow)  # the load that was given up has not ended
    verified_store.closed[slow].set()
    assert late.result(SECONDS).digest == slow
    assert verified_store.reads.count(slow) == 1


def test_a_load_that_everybody_gave_up_keeps_nothing_from_the_others(make: Make, masks: list[Mask]) -> None:
    residency = make(1)
    here, absent = masks[0].digest, masks[1].digest
    held = residency.get(here)
    waiting = [residency.request(absent) for _ in range(3)]
    until(lambda: residency.evicting > 0)
    for future in waiting:
        assert future.cancel()
    assert residency.request(here).result(0) is held  # it stays after all, and nobody queues up for it
    assert (residency.evicting, residency.tier(absent)) == (0, "disk")


def test_a_load_that_is_given_up_before_it_began_reads_nothing(
    make: Make, verified_store: Doors, masks: list[Mask]
) -> None:
    residency = make(4)
    doors = [verified_store.close(mask.digest) for mask in masks]
    loading = [residency.request(mask.digest) for mask in masks]  # one for each loader
    until(lambda: len(verified_store.reads) == len(masks))
    residency.request("0" * 64).cancel()
    for door in doors:
        door.set()
    for future in loading:
        future.result(SECONDS)
    until(lambda: residency.tier("0" * 64) == "disk")
    assert residency.loads.failed == 0  # there is no such mask, and nobody looked


def test_a_mask_on_the_device_is_never_refused_because_others_wait(make: Make, masks: list[Mask]) -> None:
    residency = make(1, waiting=2)
    here, absent = masks[0].digest, masks[1].digest
    held = residency.get(here)
    waiting = [residency.request(absent) for _ in range(2)]
    until(lambda: residency.evicting > 0)
    assert residency.request(here).result(0) is held
    with pytest.raises(Overloaded):
        residency.request(masks[2].digest)
    del held
    assert waiting[0].result(SECONDS).digest == absent  # who got the mask did not keep it from leaving


def test_closing_ends_those_who_wait_for_room(make: Make, masks: list[Mask]) -> None:
    residency = make(1)
    held = residency.get(masks[0].digest)
    waiting = residency.request(masks[1].digest)
    until(lambda: residency.evicting == held.nbytes)
    residency.close()
    with pytest.raises(NotReady):
        waiting.result(SECONDS)
    with pytest.raises(NotReady):
        residency.request(masks[2].digest)


def test_many_threads_within_a_small_budget(make: Make, masks: list[Mask]) -> None:
    residency, wrong = make(2), []

    def applied(seed: int) -> None:
        for turn in range(30):
            digest = masks[(seed * 7 + turn * (seed + 1)) % len(masks)].digest
            resident = residency.request(digest).result(SECONDS)
            if resident.digest != digest or residency.nbytes > residency.budget:
                wrong.append(digest)
            del resident

    threads = [threading.Thread(target=applied, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    asked = residency.loads.hits + residency.loads.shared + residency.loads.misses
    assert (asked, residency.loads.failed, residency.waiting) == (8 * 30, 0, 0)
    assert residency.nbytes == sum(residency.get(mask.digest).nbytes for mask in masks if mask.digest in residency)


class TestHost:
    def test_what_was_evicted_comes_back_without_the_disk(
        self, make: Make, verified_store: Doors, masks: list[Mask]
    ) -> None:
        host = HostCache(2**30)
        residency = make(1, host=host)
        bits = {mask.digest: {name: target.keep.copy() for name, target in mask.targets.items()} for mask in masks}
        for mask in masks + masks:
            resident = residency.get(mask.digest)
            found = host.find(mask.digest)
            assert found is not None
            assert found.digest == resident.digest == mask.digest
            for name, target in found.targets.items():
                assert (target.keep == bits[mask.digest][name]).all()
            del resident
        assert len(verified_store.reads) == len(masks)
        assert (residency.loads.from_host, residency.loads.from_disk) == (len(masks), len(masks))
        assert residency.tier(masks[0].digest) == "host"

    def test_the_budget_holds(self, masks: list[Mask]) -> None:
        size = sum(target.nbytes for target in masks[0].targets.values())
        host = HostCache(2 * size + size // 2)
        for mask in masks:
            assert host.keep(mask).digest == mask.digest
            assert host.nbytes <= host.budget
        assert [mask.digest in host for mask in masks] == [False, False, True, True]
        assert host.evictions == 2

    def test_one_that_is_larger_than_everything_is_passed_on(self, masks: list[Mask]) -> None:
        host = HostCache(10)
        assert host.keep(masks[0]) is masks[0]
        assert host.nbytes == 0


class TestVerifiedStore:
    def test_a_file_is_verified_once_if_it_is_old_enough_and_again_if_it_changes(
        self, store: Store, tiny: Base, masks: list[Mask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import masquerade.model.verified_store as room

        digest, verified = masks[0].digest, []
        monkeypatch.setattr(room, "LARGE", 1)
        monkeypatch.setattr(room, "_verify", lambda path, _: verified.append(path))
        verified_store, parts = VerifiedStore(store, tiny.fingerprint), min(4, os.cpu_count() or 1)
        for _ in range(2):
            verified_store.read(digest)
        assert len(verified) == 2 * parts  # it changed just now: a later change could bear the same time
        monkeypatch.setattr(room, "SETTLED", -SECONDS)
        for _ in range(3):
            verified_store.read(digest)
        assert len(verified) == 3 * parts
        os.utime(store.path(digest))
        verified_store.read(digest)
        assert len(verified) == 4 * parts

    def test_a_large_file_is_verified_by_several_threads(
        self, store: Store, tiny: Base, masks: list[Mask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import masquerade.model.verified_store as room

        monkeypatch.setattr(room, "LARGE", 1)
        path = store.path(masks[0].digest)
        assert VerifiedStore(store, tiny.fingerprint).read(masks[0].digest) == masks[0]
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1
        path.write_bytes(bytes(whole))
        with pytest.raises(DigestMismatch):
            VerifiedStore(store, tiny.fingerprint).read(masks[0].digest)
