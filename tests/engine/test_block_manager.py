"""Blocks are in use, cached or empty, and never two of these, whatever happens."""

from __future__ import annotations

import random

import pytest

from masquerade.engine.block_manager import BlockManager


def check(manager: BlockManager, held: list[list[int]]) -> None:
    """Used, cached and empty blocks are all blocks, each once; registered ones are in use or cached."""
    holders = [block for blocks in held for block in blocks]
    cached, empty = set(manager._cached), set(manager._empty)
    assert len(empty) == len(manager._empty)
    assert not set(holders) & cached
    assert not set(holders) & empty
    assert not cached & empty
    assert set(holders) | cached | empty == set(range(1, manager.num_blocks + 1))
    assert manager.num_free == len(cached) + len(empty)
    assert [manager._ref_counts[block] for block in range(1, manager.num_blocks + 1)] == [
        holders.count(block) for block in range(1, manager.num_blocks + 1)
    ]
    assert manager._block_by_hash == {key: block for block, keys in manager._hashes_by_block.items() for key in keys}
    assert cached <= manager._hashes_by_block.keys()
    assert not empty & manager._hashes_by_block.keys()


@pytest.mark.parametrize("seed", range(4))
def test_blocks_add_up_over_ten_thousand_operations(seed: int) -> None:
    rng, manager, held = random.Random(seed), BlockManager(24), []
    found = forgotten = 0
    for operation in range(10_000):
        chance = rng.random()
        if chance < 0.35 and manager.num_free:
            held.append([manager.allocate() for _ in range(rng.randint(1, min(5, manager.num_free)))])
        elif chance < 0.6 and held:
            manager.register(rng.choice(rng.choice(held)), bytes([rng.randrange(100)]))
        elif chance < 0.62 and held:
            manager.unregister(rng.choice(held))
        elif chance < 0.75:
            block = manager.lookup(key := bytes([rng.randrange(100)]))
            if block is not None:
                manager.acquire(block)
                held.append([block])
                assert manager.lookup(key) == block
                found += 1
            forgotten += block is None
        elif held:
            manager.release(reversed(held.pop(rng.randrange(len(held)))))
        if operation % 20 == 0:
            check(manager, held)
    assert min(found, forgotten) > 100
    for blocks in held:
        manager.release(blocks)
    assert manager.num_free == manager.num_blocks


def test_a_block_that_is_given_back_can_be_found_until_it_is_taken() -> None:
    manager = BlockManager(2)
    block = manager.allocate()
    manager.register(block, b"key")
    manager.release([block])
    assert manager.lookup(b"key") == block
    assert manager.allocate() != block  # the empty one goes first
    assert manager.allocate() == block
    assert manager.lookup(b"key") is None


def test_the_block_that_was_unused_longest_is_taken_and_only_that_one() -> None:
    manager = BlockManager(3)
    blocks = [manager.allocate() for _ in range(3)]
    for name, block in zip((b"a", b"b", b"c"), blocks, strict=True):
        manager.register(block, name)
    manager.release(blocks)
    manager.acquire(blocks[0])
    manager.release(blocks[:1])  # used again, so it is the last to go
    assert manager.allocate() == blocks[1]
    assert [manager.lookup(name) is None for name in (b"a", b"b", b"c")] == [False, True, False]


def test_a_shared_block_is_free_when_its_last_holder_leaves() -> None:
    manager = BlockManager(1)
    block = manager.allocate()
    manager.register(block, b"key")
    manager.acquire(block)
    manager.release([block])
    assert manager.num_free == 0
    manager.release([block])
    assert manager.num_free == 1


def test_the_first_block_of_a_name_stays() -> None:
    manager = BlockManager(2)
    first, second = manager.allocate(), manager.allocate()
    manager.register(first, b"key")
    manager.register(second, b"key")
    manager.release([second, first])
    assert manager.lookup(b"key") == first
    check(manager, [])
