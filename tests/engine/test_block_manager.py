"""Pages are held, idle or blank, and never two of these, whatever happens."""

from __future__ import annotations

import random

import pytest

from masquerade.engine.block_manager import BlockManager


def check(pool: BlockManager, held: list[list[int]]) -> None:
    """Holders, idle and blank pages are all pages, each once; what can be found is held or idle."""
    holders = [page for pages in held for page in pages]
    idle, blank = set(pool._idle), set(pool._blank)
    assert len(blank) == len(pool._blank)
    assert not set(holders) & idle
    assert not set(holders) & blank
    assert not idle & blank
    assert set(holders) | idle | blank == set(range(1, pool.count + 1))
    assert pool.free == len(idle) + len(blank)
    assert [pool._holders[page] for page in range(1, pool.count + 1)] == [
        holders.count(page) for page in range(1, pool.count + 1)
    ]
    assert pool._page_of == {key: page for page, keys in pool._keys_of.items() for key in keys}
    assert idle <= pool._keys_of.keys()
    assert not blank & pool._keys_of.keys()


@pytest.mark.parametrize("seed", range(4))
def test_pages_add_up_over_ten_thousand_operations(seed: int) -> None:
    rng, pool, held = random.Random(seed), BlockManager(24), []
    found = forgotten = 0
    for operation in range(10_000):
        chance = rng.random()
        if chance < 0.35 and pool.free:
            held.append([pool.take() for _ in range(rng.randint(1, min(5, pool.free)))])
        elif chance < 0.6 and held:
            pool.publish(rng.choice(rng.choice(held)), bytes([rng.randrange(100)]))
        elif chance < 0.62 and held:
            pool.forget(rng.choice(held))
        elif chance < 0.75:
            page = pool.find(key := bytes([rng.randrange(100)]))
            if page is not None:
                pool.hold(page)
                held.append([page])
                assert pool.find(key) == page
                found += 1
            forgotten += page is None
        elif held:
            pool.release(reversed(held.pop(rng.randrange(len(held)))))
        if operation % 20 == 0:
            check(pool, held)
    assert min(found, forgotten) > 100
    for pages in held:
        pool.release(pages)
    assert pool.free == pool.count


def test_a_page_that_is_given_back_can_be_found_until_it_is_taken() -> None:
    pool = BlockManager(2)
    page = pool.take()
    pool.publish(page, b"key")
    pool.release([page])
    assert pool.find(b"key") == page
    assert pool.take() != page  # the blank one goes first
    assert pool.take() == page
    assert pool.find(b"key") is None


def test_the_page_that_was_idle_longest_is_taken_and_only_that_one() -> None:
    pool = BlockManager(3)
    pages = [pool.take() for _ in range(3)]
    for name, page in zip((b"a", b"b", b"c"), pages, strict=True):
        pool.publish(page, name)
    pool.release(pages)
    pool.hold(pages[0])
    pool.release(pages[:1])  # used again, so it is the last to go
    assert pool.take() == pages[1]
    assert [pool.find(name) is None for name in (b"a", b"b", b"c")] == [False, True, False]


def test_a_shared_page_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockManager(1)
    page = pool.take()
    pool.publish(page, b"key")
    pool.hold(page)
    pool.release([page])
    assert pool.free == 0
    pool.release([page])
    assert pool.free == 1


def test_the_first_page_of_a_name_stays() -> None:
    pool = BlockManager(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"key")
    pool.publish(second, b"key")
    pool.release([second, first])
    assert pool.find(b"key") == first
    check(pool, [])
