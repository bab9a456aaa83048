"""Quantises a base's maskable Linears with bitsandbytes (int8 or NF4).

A correction subtracts pruned weights, dequantised (`kernels.dense_weight`), from the quantised layer's own product. A
base's fingerprint is that of its files, so a mask built on the dense base fits the quantised one and vice versa.

* `int8` is LLM.int8() (Dettmers et al. 2022): weights in 8 bits with a scale per row, inputs in 8 bits with a scale per
  token, channels with inputs above 6 in floating point. These channels are chosen per batch, so an answer's rounding
  depends on the other requests.
* `nf4` is NormalFloat 4 (Dettmers et al. 2023) in blocks of 64, or of 32 where 64 does not divide a row. Only weights
  are rounded; products are those of `dense_weight`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from masquerade.errors import UnusableModel
from masquerade.model.targets import find_targets

BLOCKS = (64, 32)  # sizes of NF4 blocks, preferred first
OUTLIER = 6.0  # inputs above this keep their channel in floating point; the paper's and transformers' default


def quantize(model: nn.Module, how: str, device: torch.device) -> None:
    """Replace the maskable Linears of a model on the CPU by quantised ones on `device`, in place.

    `how` is a name in `QUANTIZATIONS`. Raises `UnusableModel` if bitsandbytes is not installed, if the model is already
    quantised, or if bitsandbytes cannot quantise its row length correctly.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnusableModel(
            f"`--quantization {how}` needs bitsandbytes, which cannot be imported ({error}); "
            "pip install 'masquerade[quantization]'"
        ) from error
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns in every product
    make = QUANTIZATIONS[how]
    for name, linear in find_targets(model).items():
        if not linear.weight.is_floating_point():
            raise UnusableModel(
                f"`--quantization {how}`: {name} of this model is already quantised; leave the option out"
            )
        try:
            quantised = make(bitsandbytes.nn, linear)
        except ValueError as error:
            raise UnusableModel(f"`--quantization {how}`: {name}: {error}") from error
        quantised.bias = linear.bias
        model.set_submodule(name, quantised.to(device))


def _int8(nn: Any, linear: Any) -> Any:
    module = nn.Linear8bitLt(
        linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    module.weight = nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return module


def _nf4(nn: Any, linear: Any) -> Any:
    module = nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        False,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    module.weight = nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        blocksize=_block(linear.in_features),
        compress_statistics=False,
        quant_type="nf4",
        module=module,
    )
    module.support_avx512bf16_for_cpu = False  # would repack weights after the first product and change the rounding
    return module


def _block(inputs: int) -> int:
    """Weights per scale. With AVX-512 bitsandbytes misreads rows of a multiple of 16 that end inside a block."""
    for block in BLOCKS:
        if inputs % 16 or inputs % block == 0:
            return block
    raise ValueError(f"rows of {inputs} weights cannot be kept in 4 bits; take int8, or no quantization")


def measure_weight(linear: nn.Linear, how: str) -> int:
    """Bytes that bitsandbytes keeps of a Linear's weight, scales included, once it is quantised; its bias is apart.

    Raises `ValueError` if it cannot be quantised so.
    """
    return _SIZES[how](linear.in_features, linear.out_features)


def _measure_nf4(inputs: int, outputs: int) -> int:
    """Two weights a byte, a scale in fp32 a block, and the 16 levels in fp32."""
    weights = inputs * outputs
    return -(-weights // 2) + 4 * -(-weights // _block(inputs)) + 4 * 16


_SIZES: Mapping[str, Callable[[int, int], int]] = {
    "int8": lambda inputs, outputs: inputs * outputs + 4 * outputs,  # a scale in fp32 a row
    "nf4": _measure_nf4,
}
QUANTIZATIONS: Mapping[str, Callable[[Any, nn.Linear], Any]] = {"int8": _int8, "nf4": _nf4}
