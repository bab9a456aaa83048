"""The paged key-value cache: one tensor a layer, cut into pages.

Knows tensors and bytes. Refuses to know who holds a page.
"""

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
    heads, width = _shape(config)
    return 2 * int(config.num_hidden_layers) * heads * width * dtype.itemsize


class KVCache:
    """`count` pages of `PAGE` positions, page 0, which is always zero: padding reads it, and page `trash`, which nobody
    reads: padding writes it.

    Keys and values are [layers, (2 + count) * kv heads, PAGE, head size]: a head's part of a page is one run of memory,
    which is what attention wants to read.
    """

    def __init__(self, config: Any, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.heads, self.size = _shape(config)
        shape = (config.num_hidden_layers, (2 + count) * self.heads, BLOCK_SIZE, self.size)
        self.keys: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.values: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.count = count
        self.trash = count + 1
        self._heads = np.arange(self.heads)
        seen, unseen = torch.zeros(self.positions), torch.full((self.positions,), float("-inf"))
        self._bar = torch.cat([seen, unseen]).to(device=device, dtype=dtype)  # every bar is a piece of it

    @property
    def positions(self) -> int:
        """Positions that the whole cache can hold."""
        return self.count * BLOCK_SIZE

    def parts(self, pages: Index) -> Index:
        """The heads' parts of pages [..., n], as [..., heads * n]: all of the first head, then of the next."""
        return (pages[..., None, :] * self.heads + self._heads[:, None]).reshape(*pages.shape[:-1], -1)

    def slots(self, pages: Index, places: Index) -> Index:
        """Where positions lie, given their pages [rows] and places in them: [rows * heads]."""
        parts = pages[:, None] * self.heads + self._heads
        return (parts * BLOCK_SIZE + places[:, None]).reshape(-1)

    def bar(self, lengths: Index, pages: int) -> Tensor:
        """A mask for rows [rows] that see so many of the positions of `pages` pages: 0 where attention may look, minus
        infinity where it may not, [rows, pages * PAGE].
        """
        width = pages * BLOCK_SIZE
        pieces = self._bar.as_strided((2 * self.positions - width + 1, width), (1, 1))
        return pieces.index_select(0, torch.from_numpy(self.positions - lengths).to(self._bar.device))

    def clear(self, pages: list[int]) -> None:
        """Zero pages before a new holder reads around its own positions: what is masked away must still be a number,
        and the last holder's may not have been.
        """
        if pages:
            parts = torch.from_numpy(self.parts(np.array(pages))).to(self.keys.device)
            self.keys.index_fill_(1, parts, 0)
            self.values.index_fill_(1, parts, 0)

    def copy(self, source: int, target: int, places: int) -> None:
        """Copy the first places of a page to another page."""
        heads = torch.from_numpy(self._heads).to(self.keys.device)
        for cached in (self.keys, self.values):
            cached[:, target * self.heads + heads, :places] = cached[:, source * self.heads + heads, :places]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [rows * kv heads, size] at slots, int64 [rows * kv heads]."""
        self.keys[layer].view(-1, self.size).index_copy_(0, slots, k)
        self.values[layer].view(-1, self.size).index_copy_(0, slots, v)

    def read(self, layer: int, parts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of parts, int64 [rows * heads * n]: [rows, heads, n * PAGE, size]."""
        k, v = self.keys[layer].index_select(0, parts), self.values[layer].index_select(0, parts)
        shape = rows, self.heads, -1, self.size
        return k.view(shape), v.view(shape)


def _shape(config: Any) -> tuple[int, int]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_key_value_heads), int(width)
