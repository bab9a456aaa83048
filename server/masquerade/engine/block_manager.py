"""Reference counts of cache blocks, and the prefix hashes under which full blocks are found again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockManager:
    """Blocks 1 to `num_blocks`; block 0 is reserved for padding and never allocated.

    A block is in use (its reference count is positive), cached (unused, but registered under a hash), or empty. Cached
    blocks count as free: when no empty block is left, the least recently used cached one is evicted.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * (num_blocks + 1)
        self._empty = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_by_hash: dict[bytes, int] = {}
        self._hashes_by_block: dict[int, list[bytes]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that are not in use."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks that can be found by hash."""
        return len(self._cached)

    def allocate(self) -> int:
        """A block with one reference and no hash. Requires `num_free` > 0."""
        block = self._empty.pop() if self._empty else self._evict()
        self._ref_counts[block] = 1
        return block

    def lookup(self, block_hash: bytes) -> int | None:
        """The block registered under a hash. Acquire it before the next allocation, which may evict it."""
        return self._block_by_hash.get(block_hash)

    def is_cached(self, block: int) -> bool:
        """Whether a block is free and can be found by hash."""
        return block in self._cached

    def acquire(self, block: int) -> None:
        """Add a reference to a registered block."""
        self._cached.pop(block, None)
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block. Of those that become free, the first is evicted first."""
        for block in blocks:
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._hashes_by_block:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a block in use available under a hash, in addition to others. The first block of a hash keeps it."""
        if block_hash not in self._block_by_hash:
            self._block_by_hash[block_hash] = block
            self._hashes_by_block.setdefault(block, []).append(block_hash)

    def unregister(self, blocks: Iterable[int]) -> None:
        """Remove all hashes of blocks in use."""
        for block in blocks:
            for block_hash in self._hashes_by_block.pop(block, ()):
                del self._block_by_hash[block_hash]

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self.unregister([block])
        return block
