"""vLLM's Linears with LoRA, which hold lists of pruned weights instead: one slot for each persona of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

from maskstore import MaskMismatch, Sparse, Target
from vllm_masquerade.kernel import subtract_pruned


class NoRoom(MaskMismatch):
    """A mask prunes more than a slot holds."""


@dataclass(frozen=True)
class PrunedWeights:
    """What a mask prunes of a Linear's share on this rank, with the values that the Linear has there.

    The manager of vLLM passes an adapter's `lora_a` and `lora_b` on to `set_lora`; here they are the lists and
    1 - gamma.
    """

    bounds: Tensor  # int32 [out + 1]
    columns: Tensor  # int32 [pruned]
    values: Tensor  # [pruned]
    strength: float

    @property
    def lora_a(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lists."""
        return self.bounds, self.columns, self.values

    @property
    def lora_b(self) -> float:
        """1 - gamma."""
        return self.strength


class PersonaLinear(BaseLinearLayerWithLoRA):  # type: ignore[misc]  # vLLM is not checked
    """A Linear whose output loses what each row's persona prunes."""

    room: int  # pruned weights that a slot holds

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:  # noqa: ARG002
        """Allocate the slots, empty, for `room` pruned weights each."""
        self.lora_config = lora_config
        self.out = sum(size for _, size in self._local_rows())
        where = {"device": self.device}
        self.bounds = torch.zeros(max_loras, self.out + 1, dtype=torch.int32, **where)
        self.columns = torch.zeros(max_loras, self.room, dtype=torch.int32, **where)
        self.values = torch.zeros(max_loras, self.room, dtype=lora_config.lora_dtype, **where)
        self.strengths = torch.zeros(max_loras, dtype=torch.float32, **where)

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.bounds[index].zero_()

    def set_lora(self, index: int, lora_a: tuple[Tensor, Tensor, Tensor], lora_b: float) -> None:
        """Fill a slot in place, as a captured graph has its address."""
        bounds, columns, values = lora_a
        self.columns[index, : len(columns)].copy_(columns)
        self.values[index, : len(values)].copy_(values)
        self.bounds[index].copy_(bounds)
        self.strengths[index] = lora_b

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """The place where vLLM adds a LoRA's product, before bias and reduction over ranks."""
        rows, y = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        subtract_pruned(
            y, rows, self.punica_wrapper._token_lora_indices, self.bounds, self.columns, self.values, self.strengths
        )
        return output

    def parts(self) -> tuple[int, ...]:
        """Outputs of the Linears of the checkpoint that this one consists of, over all ranks."""
        base = self.base_layer
        if isinstance(base, QKVParallelLinear):
            heads, values = base.head_size, getattr(base, "v_head_size", base.head_size)
            return base.total_num_heads * heads, base.total_num_kv_heads * heads, base.total_num_kv_heads * values
        return tuple(getattr(base, "output_sizes", None) or (base.output_size,))

    def _local_rows(self) -> list[tuple[int, int]]:
        """(first row, rows) of this rank's share of each part, counted over all parts."""
        starts, sizes = [0, *accumulate(self.parts())], self.parts()
        base = self.base_layer
        if isinstance(base, RowParallelLinear) or self.tp_size == 1:
            return [*zip(starts, sizes, strict=False)]
        ranks, shares = [self.tp_rank] * len(sizes), [self.tp_size] * len(sizes)
        if isinstance(base, QKVParallelLinear):  # heads of keys and values may be on several ranks
            copies = base.num_kv_head_replicas
            ranks[1:], shares[1:] = [self.tp_rank // copies] * 2, [self.tp_size // copies] * 2
        split = [size // share for size, share in zip(sizes, shares, strict=True)]
        return [(start + rank * size, size) for start, rank, size in zip(starts, ranks, split, strict=False)]

    def gather(self, targets: Sequence[Target | None], strength: float) -> PrunedWeights:
        """What this rank holds of the targets of a mask, one for each part, or one for all; None prunes nothing.

        Raises `MaskMismatch` for another shape, and `NoRoom`.
        """
        bounds, columns = self._join(targets)
        cut = [slice(*bounds[[start, start + size]]) for start, size in self._local_rows()]
        counts = [np.diff(bounds[start : start + size + 1]) for start, size in self._local_rows()]
        rows = np.repeat(np.arange(self.out), np.concatenate(counts))
        columns = np.concatenate([columns[part] for part in cut])
        if isinstance(self.base_layer, RowParallelLinear):
            first = self.tp_rank * self.input_size
            here = (columns >= first) & (columns < first + self.input_size)
            rows, columns = rows[here], columns[here] - first
        if len(columns) > self.room:
            raise NoRoom(f"it prunes {len(columns)} weights here, and a slot has room for {self.room}")
        ends = np.cumsum(np.bincount(rows, minlength=self.out))
        at = torch.from_numpy(rows).to(self.device), torch.from_numpy(columns).to(self.device)
        return PrunedWeights(
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            torch.from_numpy(columns.astype(np.int32)),
            served_weight(self.base_layer, self.lora_config.lora_dtype)[at].to("cpu", self.lora_config.lora_dtype),
            strength,
        )

    def _join(self, targets: Sequence[Target | None]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """CSR of the targets below one another: bounds [out + 1] and columns [pruned], over all ranks."""
        sizes = self.parts() if len(targets) == len(self.parts()) else (sum(self.parts()),)
        columns = self.base_layer.input_size
        bounds, places = [np.zeros(1, np.int64)], []
        for target, size in zip(targets, sizes, strict=True):
            if target is not None and target.shape != (size, columns):
                raise MaskMismatch(f"it has the shape {(size, columns)} here, and {target.shape} in the mask")
            sparse = target.to_sparse() if target else Sparse(np.zeros(size + 1, np.int32), np.zeros(0, np.uint16), 1)
            bounds.append(bounds[-1][-1] + sparse.rows[1:].astype(np.int64))
            places.append(sparse.cols.astype(np.int64))
        return np.concatenate(bounds), np.concatenate(places)


_LAYERS: tuple[Any, ...] = tuple(
    type(f"Persona{layer.__name__}", (PersonaLinear, layer), {"__doc__": PersonaLinear.__doc__})
    for layer in (  # in the order in which vLLM tries them
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
        MergedColumnParallelLinearVariableSliceWithLoRA,
    )
)


def make_layer(linear: nn.Module, packed: list[str], lora_config: Any, model_config: Any) -> PersonaLinear | None:
    """A Linear as one with slots, which are not allocated yet; None if vLLM has no LoRA for it.

    `packed` names the Linears of the checkpoint that it consists of.
    """
    for layer in _LAYERS:
        if layer.can_replace_layer(
            source_layer=linear, lora_config=lora_config, packed_modules_list=packed, model_config=model_config
        ):
            made: PersonaLinear = layer(linear)
            return made
    return None


def served_weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a Linear of this rank multiplies with, dequantised if it is quantised."""
    weight: Tensor | None = getattr(linear, "weight", None)
    shape = linear.output_size_per_partition, linear.input_size_per_partition
    if not isinstance(linear.quant_method, UnquantizedLinearMethod):
        weight = get_and_maybe_dequant_weights(linear, dtype)
    elif weight is None or tuple(weight.shape) != shape:
        # On a CPU vLLM packs the weight and drops it: each column is the product with a row of the identity.
        identity = torch.eye(shape[1], dtype=dtype, device=None if weight is None else weight.device)
        weight = linear.quant_method.apply(linear, identity, None).T
    if weight is None or tuple(weight.shape) != shape:
        raise MaskMismatch(f"its weight cannot be read from {type(linear.quant_method).__name__}")
    return weight
