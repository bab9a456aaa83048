"""The paged key-value cache: one tensor of keys and one of values for each layer, divided into blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masquerade.engine.prefix import BLOCK_SIZE

Index = NDArray[np.int64]


def bytes_per_position(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one position takes over all layers."""
    kv_heads, head_size = _shape(config)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_size * dtype.itemsize


def count_blocks(block_bytes: int, context: int, max_running: int, cache_bytes: int) -> int:
    """Blocks for requests: as many as fit the budget, but at most twice what the running requests can use."""
    useful = 2 * max_running * -(-context // BLOCK_SIZE)
    return max(1, min(useful, cache_bytes // block_bytes))


class KVCache:
    """`num_blocks` blocks of `BLOCK_SIZE` positions, and two for padding: block 0 is always zero and padding reads it;
    padding writes to `scratch_block`, which is never read.

    It has all layers of a model, or those from `first_layer` on that are on one device; the methods number them from 0.
    Keys and values are [layers, (2 + num_blocks) * kv heads, BLOCK_SIZE, head size]. One head's part of a block, a
    "head block", is contiguous, which is the layout that attention reads.
    """

    def __init__(
        self, config: Any, num_blocks: int, dtype: torch.dtype, device: torch.device, layers: range | None = None
    ) -> None:
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.first_layer = layers.start
        self.kv_heads, self.head_size = _shape(config)
        shape = (len(layers), (2 + num_blocks) * self.kv_heads, BLOCK_SIZE, self.head_size)
        # Without values: a block is cleared when it is allocated, and on a CPU it takes no memory before that.
        self.keys: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.values: Tensor = torch.empty(shape, dtype=dtype, device=device)
        self.layers = [*zip(self.keys, self.values, strict=True)]  # keys and values of each layer
        self._slots = [tuple(part.view(-1, self.head_size) for part in layer) for layer in self.layers]
        self.device = device
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks + 1
        self._heads = np.arange(self.kv_heads)
        self.zero([0])
        visible, hidden = torch.zeros(self.positions), torch.full((self.positions,), float("-inf"))
        self._mask_row = torch.cat([visible, hidden]).to(device=device, dtype=dtype)  # every mask row is a slice of it

    @property
    def positions(self) -> int:
        """Positions that the whole cache can hold."""
        return self.num_blocks * BLOCK_SIZE

    def to_device(self, array: NDArray[np.generic]) -> Tensor:
        """An array as a tensor on the cache's device."""
        return torch.from_numpy(array).to(self.device)

    def head_blocks(self, blocks: Index) -> Index:
        """Indices of the head blocks of blocks [..., n]: [..., kv heads * n], those of the first head first."""
        return (blocks[..., None, :] * self.kv_heads + self._heads[:, None]).reshape(*blocks.shape[:-1], -1)

    def slots(self, blocks: Index, offsets: Index) -> Index:
        """The slots of positions, given their blocks [rows] and the offsets in them: [rows * kv heads]."""
        head_blocks = blocks[:, None] * self.kv_heads + self._heads
        return (head_blocks * BLOCK_SIZE + offsets[:, None]).reshape(-1)

    def attention_mask(self, lengths: Index, num_blocks: int) -> Tensor:
        """0 for the first `lengths` [rows] of the positions in `num_blocks` blocks and minus infinity for the others:
        [rows, num_blocks * BLOCK_SIZE].
        """
        width = num_blocks * BLOCK_SIZE
        slices = self._mask_row.as_strided((2 * self.positions - width + 1, width), (1, 1))
        return slices.index_select(0, self.to_device(self.positions - lengths))

    def zero(self, blocks: list[int]) -> None:
        """Clear blocks before reuse: masked positions are still multiplied, and a NaN that a previous request left
        there would spread.
        """
        if blocks:
            head_blocks = self.to_device(self.head_blocks(np.array(blocks)))
            self.keys.index_fill_(1, head_blocks, 0)
            self.values.index_fill_(1, head_blocks, 0)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a block to another block."""
        heads = self.to_device(self._heads)
        for cached in (self.keys, self.values):
            cached[:, target * self.kv_heads + heads, :count] = cached[:, source * self.kv_heads + heads, :count]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [rows, kv heads, head size] in slots, int64 [rows * kv heads]."""
        index = (slots.view(k.shape[:2]),)
        for cached, own in zip(self._slots[layer], (k, v), strict=True):
            cached.index_put_(index, own)  # `index_copy_` would first copy heads that are parts of merged outputs

    def read(self, layer: int, head_blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of head blocks, int64 [rows * kv heads * n]: [rows, kv heads, n * BLOCK_SIZE, head size]."""
        k, v = self.keys[layer].index_select(0, head_blocks), self.values[layer].index_select(0, head_blocks)
        shape = rows, self.kv_heads, -1, self.head_size
        return k.view(shape), v.view(shape)


def _shape(config: Any) -> tuple[int, int]:
    """The number of key-value heads, and the size of one."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads), int(head_size)
