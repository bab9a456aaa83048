"""Weights that stay quantised as a GGUF file has them, in blocks with a scale, laid out for the native kernels.

Their values are the file's, rounded to bfloat16 like those of a weight that is dequantised when it is loaded. The
kernels dequantise a few outputs at a time and multiply them like plain ones, so products have the same bits. If a
weight `rounds`, the inputs of its products are rounded to 8 bits instead, as llama.cpp does (`cpp/rounded.h`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from masquerade.kernels.gradients import differentiate
from masquerade.kernels.native import has_bf16, multiply_base, require_library

_NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # GGUF's
FORMS: Mapping[str, int] = {name: number for number, name in enumerate(_NAMES, 1)}  # as in product.h
TILE = 4  # outputs that are laid out together


class QuantisedWeight(nn.Parameter):
    """A weight [out, in] in one of `FORMS`, as uint8 in the layout of `cpp/quantised.h`."""

    form: int
    matrix: tuple[int, int]  # out, in
    rounds: bool  # whether products round the inputs to 8 bits

    @classmethod
    def empty(cls, form: str, out: int, columns: int, *, rounds: bool = False) -> Self:
        """A weight with values that are anything; `columns` is a multiple of 32, with K of 256."""
        data = torch.empty(measure(form, out, columns), dtype=torch.uint8)
        return cls._make(data, FORMS[form], (out, columns), rounds)

    @classmethod
    def _make(cls, data: Tensor, form: int, matrix: tuple[int, int], rounds: bool) -> Self:
        weight = cls(data, requires_grad=False)
        weight.form, weight.matrix, weight.rounds = form, matrix, rounds
        return weight

    def write(self, first: int, blocks: NDArray[np.uint8]) -> None:
        """Write rows from `first` on, a multiple of `TILE`: GGUF's blocks [rows, bytes of a row]."""
        blocks = np.ascontiguousarray(blocks)
        require_library().write_quantised(
            self.form, blocks.ctypes.data, first, len(blocks), self.matrix[1], self.data_ptr()
        )

    def read(self, rows: Tensor | None = None) -> Tensor:
        """The values of rows [n], int64, or of all: bfloat16 [n, in]."""
        rows = torch.arange(self.matrix[0]) if rows is None else rows.contiguous()
        values = torch.empty(len(rows), self.matrix[1], dtype=torch.bfloat16)
        require_library().read_quantised(
            self.form, self.data_ptr(), rows.data_ptr(), len(rows), self.matrix[1], values.data_ptr()
        )
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedWeight:
        if id(self) not in memo:
            memo[id(self)] = self._make(self.data.clone(), self.form, self.matrix, self.rounds)
        copy: QuantisedWeight = memo[id(self)]
        return copy

    def __reduce_ex__(self, _: Any) -> Any:
        return type(self)._make, (self.data, self.form, self.matrix, self.rounds)


class QuantisedLinear(nn.Linear):
    """A Linear whose weight stays quantised."""

    def __init__(self, weight: QuantisedWeight, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.matrix
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs [..., in] to outputs [..., out] in bfloat16."""
        if torch.is_grad_enabled() and x.requires_grad:
            return differentiate(x, self.weight, self.bias)
        return multiply_base(x, self.weight, self.bias)


class QuantisedEmbedding(nn.Module):
    """An embedding whose rows stay quantised; a tied head may share the weight."""

    def __init__(self, weight: QuantisedWeight) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.matrix
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [...] to embeddings [..., in] in bfloat16. Raises `IndexError` for an id that has none."""
        rows = ids.reshape(-1)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_embeddings:
            raise IndexError(f"token ids must be from 0 to {self.num_embeddings - 1}")
        weight: Any = self.weight
        embeddings: Tensor = weight.read(rows.long())
        return embeddings.view(*ids.shape, self.embedding_dim)


def pays() -> bool:
    """Whether quantised weights are about as fast here as plain ones, or faster (docs/performance.md)."""
    return has_bf16()


def measure(form: str, out: int, columns: int) -> int:
    """Bytes of a weight in one of `FORMS`."""
    size: int = require_library().measure_quantised(FORMS[form], out, columns)
    return size
