"""Embeddings: the last hidden states of a prompt's positions, pooled into one vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Pooling = Literal["mean", "last"]
Vector = NDArray[np.float32]


class Embedding:
    """Pools the hidden states of one request, chunk by chunk.

    `vector` is set at the end: fp32 [hidden size], of length 1; None until then, and if a state is not finite.
    """

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._parts: dict[int, Tensor] = {}  # first position -> pooled chunk; a repeated chunk replaces itself
        self.vector: Vector | None = None

    def add(self, states: Tensor, start: int) -> None:
        """Add the states [rows, hidden size] of the positions from `start` on. Position 0 begins anew, as after a
        preemption.
        """
        if start == 0 or self._pooling == "last":
            self._parts.clear()
        self._parts[start] = states[-1].double() if self._pooling == "last" else states.sum(0, dtype=torch.float64)

    def finish(self) -> bool:
        """Set `vector`; False if a state is not finite. A sum and a mean have the same direction."""
        total = torch.stack([*self._parts.values()]).sum(0)
        self._parts.clear()
        vector = total / total.norm()
        if not bool(vector.isfinite().all()):
            return False
        self.vector = vector.float().cpu().numpy()
        return True


class EmbeddedRows(NamedTuple):
    """Rows [start, stop) of a packed batch are the positions of an embedded prompt from `position` on."""

    embedding: Embedding
    start: int
    stop: int
    position: int


@contextmanager
def collect_states(model: nn.Module, rows: Iterable[EmbeddedRows]) -> Iterator[None]:
    """Pool the last hidden states (after the final norm) of these rows in the forward pass of the block."""
    rows = list(rows)

    def pool(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        states = output[0][0]  # [rows, hidden size]
        for embedding, start, stop, position in rows:
            embedding.add(states[start:stop], position)

    backbone: nn.Module = model.base_model  # type: ignore[assignment]  # of transformers
    handle = backbone.register_forward_hook(pool) if rows else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
