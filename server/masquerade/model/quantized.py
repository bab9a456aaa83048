"""A base in fewer bits: its maskable Linears become bitsandbytes' (int8 or NF4); everything else stays as it is.

Knows how bitsandbytes is set. Refuses to know masks: what a persona prunes is subtracted from the quantised layer's own
product, with values taken from the weights it stands for (`kernels.dense_weight`). The fingerprint of a base is that
of its files, so masks found on the dense base are worn by the quantised one, and the other way round.

* `int8` is LLM.int8() (Dettmers et al. 2022): weights in 8 bits a row, inputs in 8 bits a token, channels with inputs
  above 6 in floating point. Which channels those are is decided for a whole batch, so an answer's rounding depends on
  its neighbours.
* `nf4` is NormalFloat 4 (Dettmers et al. 2023) in blocks of 64, or of 32 where 64 do not divide a row; only weights
  are rounded, products are those of `dense_weight`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from masquerade.errors import UnusableModel
from masquerade.model.targets import find_targets

BLOCKS = (64, 32)  # sizes of NF4 blocks, the better first
OUTLIER = 6.0  # inputs from which on a channel is not rounded to int8; the paper's, and transformers' default


def quantize(model: nn.Module, how: str, device: torch.device) -> None:
    """Replace the maskable Linears of a model, which is on the CPU, by quantised ones on the device, in place.

    `how` is a name in `QUANTIZATIONS`. Raises `UnusableModel` if bitsandbytes is not installed, if the model is
    quantised already, or if it has rows that bitsandbytes would get wrong.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnusableModel(
            f"`--quantization {how}` needs bitsandbytes, which cannot be imported ({error}); "
            "pip install 'masquerade[quantization]'"
        ) from error
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning for every product
    make = QUANTIZATIONS[how]
    for name, linear in find_targets(model).items():
        if not linear.weight.is_floating_point():
            raise UnusableModel(
                f"`--quantization {how}`: {name} of this model is quantised already; leave the option out"
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
    module.support_avx512bf16_for_cpu = False  # would store weights another way after the first product, and round it
    return module


def _block(inputs: int) -> int:
    """Weights to a scale. On AVX-512 bitsandbytes misreads rows of a multiple of 16 that end inside a block."""
    for block in BLOCKS:
        if inputs % 16 or inputs % block == 0:
            return block
    raise ValueError(f"rows of {inputs} weights cannot be kept in 4 bits; take int8, or no quantization")


QUANTIZATIONS: Mapping[str, Callable[[Any, nn.Linear], Any]] = {"int8": _int8, "nf4": _nf4}
