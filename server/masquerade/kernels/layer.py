"""A decoder layer of Llama's structure on a CPU in one call, in C++ (`cpp/layer.cpp`).

A row's result is bit-identical for every composition of the batch and every number of threads. Products and attention
have the bits of `NativeProduct` and `attend_chunks`; what is between them is rounded where transformers rounds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masquerade.kernels.attention import PagedChunks
from masquerade.kernels.native import DTYPES, NativeProduct, require_library

_STEP = "5P4q"  # slots; blocks, starts, rows and lengths of chunks; chunks, width, positions of a block, rows
_LINEAR = "2P4q"  # weight, bias, out, in, dtype, index
_LAYER = _LINEAR * 7 + "4P5q3d"  # Linears, norms, dtype, heads, kv heads, head size, order of norms, eps and factors


class PagedStep:
    """The rows of a step, and the cache that has their keys and values. Laid out once for all layers."""

    def __init__(self, chunks: PagedChunks, slots: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`slots` is int64 [rows * kv heads]; `layers` has the keys and values of each, [blocks * kv heads, positions
        of a block, head size].
        """
        self._kept = chunks, slots  # what the addresses point to
        self.layers = layers
        self.rows = chunks.num_rows
        sizes = chunks.count, chunks.width, layers[0][0].shape[1], self.rows
        self.packed = struct.pack(_STEP, slots.data_ptr(), *chunks.addresses, *sizes)


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer consists of."""

    linears: Sequence[nn.Linear]  # q, k, v, o, gate, up, down
    indices: Sequence[int]  # of the Linears in the tables of `NativeParts`
    norms: Sequence[nn.Module | None]  # before attention, before the MLP; of the heads of queries and keys, if any
    norms_rotated: bool  # whether heads are normalised after they are rotated
    head_size: int
    eps: float  # of all norms
    scale: float  # of the scores
    residual: float  # multiplies what is added to the rows


class NativeLayer:
    """A decoder layer, as long as its parameters are where and what the library supports."""

    def __init__(self, parts: LayerParts) -> None:
        self._parts = parts
        named = [(linear, name) for linear in parts.linears for name in ("weight", "bias")]
        named += [(norm, "weight") for norm in parts.norms if norm is not None]
        self._parameters = [(module._parameters, name) for module, name in named if getattr(module, name) is not None]
        self._addresses: list[int] = []
        self._dtype: torch.dtype | None = None  # of the parameters; None if they are not supported
        self._packed = b""

    def __call__(
        self,
        x: Tensor,
        step: PagedStep,
        number: int,
        product: NativeProduct | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        """The layer's output for rows x [1, rows, hidden], whose keys and values it writes into the cache of layer
        `number`; None, and nothing is written, if it cannot be computed so.

        `product` is of the batch; None if no row has a mask. `rotation` is cosines and sines [1, rows, head size].
        Raises `ValueError` as `NativeProduct` does.
        """
        held = [parameters[name].data_ptr() for parameters, name in self._parameters]  # type: ignore[union-attr]
        if held != self._addresses:  # at first, and when a parameter has moved
            self._addresses = held
            self._pack()
        keys, values = step.layers[number]
        tensors = [x, keys, *(rotation or ())]
        if any(tensor.dtype != self._dtype or not tensor.is_contiguous() for tensor in tensors):
            return None
        if x.shape[:-1] != (1, step.rows) or keys.shape[2] != self._parts.head_size:
            return None
        if rotation and rotation[0].shape != (1, step.rows, self._parts.head_size):
            return None
        library, y = require_library(), torch.empty_like(x)
        failed = library.run_layer(
            self._packed,
            step.packed,
            *(product.packed if product else (None, 0)),
            *((part.data_ptr() for part in rotation) if rotation else (None, None)),
            keys.data_ptr(),
            values.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            library.fastest,
            torch.get_num_threads(),
        )
        if failed:
            raise ValueError(f"spans overlap or end beyond the {step.rows} rows")
        return y

    def _pack(self) -> None:
        parts, self._dtype = self._parts, None
        tensors = [parameters[name] for parameters, name in self._parameters]
        (dtype, *others) = {tensor.dtype for tensor in tensors if tensor is not None}
        on_cpu = all(tensor is not None and tensor.is_contiguous() and tensor.is_cpu for tensor in tensors)
        if others or dtype not in DTYPES or not on_cpu:
            return
        fields: list[int] = []
        for linear, index in zip(parts.linears, parts.indices, strict=True):
            fields += _address(linear.weight), _address(linear.bias), *linear.weight.shape, DTYPES[dtype], index
        fields += (0 if norm is None else _address(norm.weight) for norm in parts.norms)
        heads, kv_heads = (linear.out_features // parts.head_size for linear in parts.linears[:2])
        fields += DTYPES[dtype], heads, kv_heads, parts.head_size, parts.norms_rotated
        self._packed = struct.pack(_LAYER, *fields, parts.eps, parts.scale, parts.residual)
        self._dtype = dtype


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
