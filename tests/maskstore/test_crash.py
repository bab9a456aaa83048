"""Writers that die and writers that compete, as real processes on a real file system."""

import os
import random
import signal
import time
from collections.abc import Callable

from maskstore import Mask, MaskConflict, Registry, Store, fsck, gc, import_mask, write_mask
from tests.maskstore import world

KILLS = 80
PUBLICATIONS = 500  # by each of two processes


def number(at: int):
    """The mask that is generation `at`."""
    return world.mask(at, shapes={"a": (40, 200), "b": (8, 64)}, share=0.2)


def spawn(work: Callable[[Callable[[], object]], object]) -> tuple[int, int]:
    """A child at work, which leaves without cleaning up after pytest, and a pipe that gets a byte
    whenever it reports."""
    reports, report = os.pipe()
    child = os.fork()
    if child:
        os.close(report)
        return child, reports
    try:
        work(lambda: os.write(report, b"."))
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_killing_a_writer_leaves_the_old_or_the_new(tmp_path):
    root = tmp_path / "store"
    registry = Registry(root)
    registry.publish("pirate", registry.store.add(number(1)))
    dice = random.Random(1)
    own = Registry(tmp_path / "own")
    own.publish("pirate", own.store.add(number(1)))
    reached, leftovers = 1, 0
    for round_ in range(KILLS):
        if round_ % 20 == 0:
            pace = seconds_of(lambda: publish(own))  # of this machine, now
        child, reports = spawn(lambda report: publish_on(registry, report))
        os.read(reports, 1)  # it is at work
        if round_ % 2:
            assert os.read(reports, 1)  # and got somewhere
        time.sleep(dice.uniform(0, 2 * pace))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reports)
        checkup = fsck(root)
        assert checkup.clean, (round_, checkup)
        leftovers += bool(checkup.leftovers)
        current = registry.resolve("pirate")
        assert current.number >= reached
        assert current.digest == number(current.number).digest
        assert registry.store.open(current.digest).pruned
        reached = current.number
    assert reached > KILLS / 2
    assert leftovers  # and was hit in the middle of a file
    gc(root, grace=-1)
    assert fsck(root).leftovers == ()


def publish_on(registry: Registry, report: Callable[[], object]) -> None:
    """Publish one generation after the other, forgetting and collecting old ones on the way."""
    report()
    while True:
        publish(registry)
        report()


def publish(registry: Registry) -> None:
    current = registry.resolve("pirate")
    digest = WAYS[current.number % len(WAYS)](registry.store, number(current.number + 1))
    registry.publish("pirate", digest, expected=current.digest)
    if current.number % 5 == 0:
        registry.trim("pirate", keep=3)
        gc(registry.store.root, grace=0)


def seconds_of(work: Callable[[], object]) -> float:
    """The best of a few times."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def add(store: Store, mask: Mask) -> str:
    return store.add(mask)


def stream(store: Store, mask: Mask) -> str:
    with store.writing(mask.base, mask.info) as writer:
        for name, target in mask.targets.items():
            writer.add(name, target)
    return writer.digest


def bring(store: Store, mask: Mask) -> str:
    path = store.root.parent / "in.safetensors"
    write_mask(mask, path)
    return import_mask(store, path).digest


WAYS = (add, stream, bring)


def test_two_processes_lose_no_update(tmp_path):
    registry = Registry(tmp_path)
    digests = [[registry.store.add(number(2 * who + turn)) for turn in (0, 1)] for who in (0, 1)]
    children = [spawn(lambda _, mine=mine: compete(registry, mine))[0] for mine in digests]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    history = registry.history("pirate")[::-1]
    assert [item.number for item in history] == list(range(1, 2 * PUBLICATIONS + 1))
    for mine in digests:
        published = [item.digest for item in history if item.digest in mine]
        assert published == [mine[turn % 2] for turn in range(PUBLICATIONS)]
    assert fsck(tmp_path).clean


def compete(registry: Registry, mine: list[str]) -> None:
    """Publish two masks in turn, each over whatever is current just then."""
    for turn in range(PUBLICATIONS):
        while True:
            names = registry.names()
            expected = names[0].digest if names else None
            try:
                registry.publish("pirate", mine[turn % 2], expected)
                break
            except MaskConflict:
                continue
