"""Decoder layers of Llama's structure on a CPU in one call, in C++ (`cpp/layers.cpp`).

A row's result is bit-identical for every composition of the batch and every number of threads. Products and attention
have the bits of `NativeProduct` and `attend_chunks`; what is between them is rounded where transformers rounds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masquerade.kernels.attention import PagedChunks, check_block
from masquerade.kernels.native import DTYPES, NativeProduct, check_memory, describe_weight, require_library

_STEP = "7P5q"  # keys, values, slots; blocks, starts, rows and lengths of chunks; counts, and bytes of a layer's keys
_LINEAR = "2P4q"  # weight, bias, out, in, form, index
_LAYER = _LINEAR * 7 + "4P6q3d"  # Linears, norms, dtype, heads, kv heads, head size, two switches, eps and factors


class PagedStep:
    """The rows of a step, and the cache that has their keys and values. Laid out once for all layers."""

    def __init__(self, chunks: PagedChunks, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """`slots` is int64 [rows * kv heads]; keys and values are [layers, blocks * kv heads, positions of a block,
        head size]. Raises `ValueError` as `check_block` does.
        """
        check_block(keys.shape[2])
        self._kept = chunks, slots, values  # what the addresses point to
        self.keys, self.rows = keys, chunks.num_rows
        addresses = keys.data_ptr(), values.data_ptr(), slots.data_ptr(), *chunks.addresses
        sizes = chunks.count, chunks.width, keys.shape[2], self.rows, keys.stride(0) * keys.itemsize
        self.packed = struct.pack(_STEP, *addresses, *sizes)


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer consists of."""

    linears: Sequence[nn.Linear]  # q, k, v, o, gate, up, down
    indices: Sequence[int]  # of the Linears in the tables of `NativeParts`
    norms: Sequence[nn.Module | None]  # before attention, before the MLP; of the heads of queries and keys, if any
    rotates: bool  # whether heads have rotary positions
    norms_rotated: bool  # whether heads are normalised after they are rotated
    head_size: int
    eps: float  # of all norms
    scale: float  # of the scores
    residual: float  # multiplies what is added to the rows

    @property
    def parameters(self) -> Iterator[tuple[dict[str, nn.Parameter | None], str]]:
        """Where the modules have their parameters."""
        named: list[tuple[nn.Module | None, str]] = [(norm, "weight") for norm in self.norms]
        named += [(linear, name) for linear in self.linears for name in ("weight", "bias")]
        for module, name in named:
            if module is not None and module._parameters.get(name) is not None:
                yield module._parameters, name

    def pack(self, dtype: torch.dtype) -> bytes:
        """The layer as the library reads it, with the addresses that its parameters have now."""
        fields: list[int] = []
        for linear, index in zip(self.linears, self.indices, strict=True):
            shape, _, form = describe_weight(linear.weight)
            fields += _address(linear.weight), _address(linear.bias), *shape, form, index
        fields += (_address(None if norm is None else norm._parameters["weight"]) for norm in self.norms)
        heads, kv_heads = (linear.out_features // self.head_size for linear in self.linears[:2])
        fields += DTYPES[dtype], heads, kv_heads, self.head_size, self.rotates, self.norms_rotated
        return struct.pack(_LAYER, *fields, self.eps, self.scale, self.residual)


class NativeLayers:
    """Consecutive decoder layers, as long as their parameters are where and what the library supports."""

    def __init__(self, first: int, layers: Sequence[LayerParts]) -> None:
        """`first` is the index of the first of them in the model."""
        self.first, self._layers = first, layers
        self._parameters = [held for layer in layers for held in layer.parameters]
        self._addresses: list[int] = []
        self._dtype: torch.dtype | None = None  # of all parameters; None if they are not supported
        self._packed = b""

    def __call__(
        self, x: Tensor, step: PagedStep, product: NativeProduct | None, rotation: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """The output for rows x [1, rows, hidden], whose keys and values are written into the cache; None, and nothing
        is written, if the library does not support it.

        `product` is of the batch; None if no row has a mask. `rotation` is cosines and sines [1, rows, head size].
        Raises `ValueError` and `MemoryError` as `NativeProduct` does.
        """
        addresses = [held[name].data_ptr() for held, name in self._parameters]  # type: ignore[union-attr]
        if addresses != self._addresses:  # at first, and when a parameter has moved
            self._addresses = addresses
            self._pack()
        size, tensors = self._layers[0].head_size, (x, step.keys, *rotation)
        if any(tensor.dtype != self._dtype or not tensor.is_contiguous() for tensor in tensors):
            return None
        if x.shape[:-1] != (1, step.rows) or step.keys.shape[-1] != size or rotation[0].shape != (1, step.rows, size):
            return None
        library, y = require_library(), torch.empty_like(x)
        failed = library.run_layers(
            self._packed,
            self.first,
            len(self._layers),
            step.packed,
            *(product.packed if product else (None, 0)),
            *(part.data_ptr() for part in (*rotation, x, y)),
            library.fastest,
            torch.get_num_threads(),
        )
        check_memory(failed)
        if failed:
            raise ValueError(f"spans overlap or end beyond the {step.rows} rows")
        return y

    def _pack(self) -> None:
        parameters = [held[name] for held, name in self._parameters]
        dtypes = {describe_weight(parameter)[1] for parameter in parameters if parameter is not None}
        fits = all(one is not None and one.is_cpu and one.is_contiguous() for one in parameters)
        (self._dtype,) = dtypes if fits and len(dtypes) == 1 and dtypes <= DTYPES.keys() else (None,)
        if self._dtype is not None:
            self._packed = b"".join(layer.pack(self._dtype) for layer in self._layers)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
