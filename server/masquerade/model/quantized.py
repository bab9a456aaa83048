"""Quantises a base's maskable Linears with bitsandbytes (int8, NF4 or FP4), and checks checkpoints that are quantised.

A correction subtracts pruned weights, dequantised (`kernels.dense_weight`), from the quantised layer's own product. A
base's fingerprint is that of its files, so a mask of the unquantised base fits the quantised one and vice versa. It is
served there if it was measured there (`service/serving.py`).

* `int8` is LLM.int8() (Dettmers et al. 2022): weights in 8 bits with a scale per row, inputs in 8 bits with a scale per
  token, channels with inputs above 6 in floating point. These channels are chosen per batch, so an answer's rounding
  depends on the other requests.
* `nf4` is NormalFloat 4 (Dettmers et al. 2023) in blocks of 64, or of 32 where 64 does not divide a row. Only weights
  are rounded; products are those of `dense_weight`.
* `fp4` is the same with the levels of a float of 4 bits, which fit normally distributed weights less well.

`a8` is not of bitsandbytes: the weights of a GGUF file stay in its blocks, and products round each 32 inputs of a row
to 8 bits with a scale (`kernels/quantised.py`). The rows of a bitmap, and gradients, take inputs as they are.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from masquerade.errors import UnusableModel, quote
from masquerade.model.targets import find_targets

BLOCKS = (64, 32)  # sizes of blocks of 4-bit weights, preferred first
BITSANDBYTES = "bitsandbytes"
_CONFIGS = ("quantization_config", "compression_config")
_QUANTISED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight.absmax", ".SCB")
_BITSANDBYTES_STATE = re.compile(r"\.SCB$|\.quant_state\.bitsandbytes__")  # beside each weight in 8 or 4 bits
_INSTEAD = (
    "take the unquantised checkpoint, with --quantization int8, nf4 or fp4 if it must be small, or a GGUF file of it"
)
A8 = "a8"
OUTLIER = 6.0  # inputs above this keep their channel in floating point; the paper's and transformers' default


def quantize(model: nn.Module, how: str, find_device: Callable[[str], torch.device]) -> None:
    """Replace the maskable Linears of a model on the CPU by quantised ones, in place, each on the device of its name.

    `how` is a name in `QUANTIZATIONS`. Raises `UnusableModel` if bitsandbytes is not installed, if the model is already
    quantised, or if bitsandbytes cannot quantise its row length correctly.
    """
    bitsandbytes = _import_bitsandbytes(f"`--quantization {how}`")
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
        model.set_submodule(name, quantised.to(find_device(name)))


def _import_bitsandbytes(what: str, *more: str) -> Any:
    """The package, quiet. Raises `UnusableModel` if it, or one of more packages that `what` needs, is missing."""
    for module in ("autograd._functions", "backends.cpu.ops"):  # they warn in every product, or of what is not used
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)
    try:
        return [importlib.import_module(name) for name in (*more, BITSANDBYTES)][-1]
    except ImportError as error:
        raise UnusableModel(
            f"{what} needs {' and '.join((BITSANDBYTES, *more))}, which cannot be imported ({error}); "
            "pip install 'masquerade[quantization]'"
        ) from error


def check_stored(name: str, config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """How bitsandbytes has quantised the weights in a checkpoint's files, which are served as they are: a name in
    `QUANTIZATIONS`, or None.

    `config` is config.json's object, `tensors` the names in the safetensors headers. Raises `UnusableModel` for every
    other quantisation.
    """
    how = _find_config(config)
    method = how.get("quant_method") if isinstance(how, Mapping) else how
    if isinstance(how, Mapping) and method is None and (how.get("load_in_4bit") or how.get("load_in_8bit")):
        method = BITSANDBYTES  # written before there was `quant_method`
    if method == BITSANDBYTES and "text_config" in config:
        raise UnusableModel(
            f"{name!r} is a model of text and images that {BITSANDBYTES} quantised, which cannot be loaded; {_INSTEAD}"
        )
    if method == BITSANDBYTES and isinstance(how, Mapping):
        return _find_form(name, how, [*tensors])
    if how:
        raise UnusableModel(f"{name!r} is quantised with {quote(method)} in its files; {_INSTEAD}")
    strange = next((tensor for tensor in tensors if tensor.endswith(_QUANTISED)), None)
    if strange:
        raise UnusableModel(
            f"{name!r} has the quantised tensor {strange}, and its config.json has no `quantization_config` that says "
            f"how to read it; {_INSTEAD}"
        )
    return None


def _find_form(name: str, how: Mapping[str, Any], tensors: Sequence[str]) -> str:
    """The name in `QUANTIZATIONS` of what bitsandbytes has done. Raises `UnusableModel` if there is none, or if no
    tensor was quantised; no tensors at all are those of a config alone.
    """
    if tensors and not any(_BITSANDBYTES_STATE.search(tensor) for tensor in tensors):
        raise UnusableModel(
            f"{name!r}: its config.json says that {BITSANDBYTES} quantised the weights, and they are not; "
            "remove its `quantization_config`, and use --quantization if the model must be small"
        )
    if how.get("load_in_8bit"):
        return "int8"
    form = how.get("bnb_4bit_quant_type", "fp4")
    if form not in ("nf4", "fp4"):
        raise UnusableModel(
            f"{name!r}: the bnb_4bit_quant_type in its config.json is {quote(form)}; it must be nf4 or fp4"
        )
    return str(form)


def _find_config(config: Mapping[str, Any]) -> Any:
    """What a config, or its part for text, says of quantisation."""
    text = config.get("text_config")
    parts = (config, text) if isinstance(text, Mapping) else (config,)
    return next((part[key] for part in parts for key in _CONFIGS if part.get(key)), None)


def import_stored(name: str) -> None:
    """Prepare to load a checkpoint that bitsandbytes quantised. Raises `UnusableModel` if a package is missing."""
    _import_bitsandbytes(f"{name!r}, which is quantised in its files,", "accelerate")


def adopt(name: str, model: Any) -> None:
    """Make Linears that a checkpoint quantised compute what `dense_weight` says, in the model's dtype, in place.

    Raises `UnusableModel` for rows that bitsandbytes misreads.
    """
    for target, linear in find_targets(model).items():
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            continue
        if _is_misread(linear.in_features, state.blocksize):
            raise UnusableModel(
                f"{name!r}: {target} has rows of {linear.in_features} weights in blocks of {state.blocksize}, which "
                f"bitsandbytes misreads on CPUs; {_INSTEAD}"
            )
        quantised: Any = linear
        state.dtype = model.dtype
        quantised.compute_dtype = model.dtype
        quantised.compute_type_is_set = True
        quantised.support_avx512bf16_for_cpu = False


def _int8(nn: Any, linear: Any) -> Any:
    module = nn.Linear8bitLt(
        linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    module.weight = nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return module


def _4bit(kind: str, nn: Any, linear: Any) -> Any:
    module = nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        False,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type=kind,
        device="meta",
    )
    module.weight = nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        blocksize=_block(linear.in_features),
        compress_statistics=False,
        quant_type=kind,
        module=module,
    )
    module.support_avx512bf16_for_cpu = False  # would repack weights after the first product and change the rounding
    return module


def _block(inputs: int) -> int:
    """Weights per scale."""
    for block in BLOCKS:
        if not _is_misread(inputs, block):
            return block
    raise ValueError(f"rows of {inputs} weights cannot be kept in 4 bits; take int8, or no quantization")


def _is_misread(inputs: int, block: int) -> bool:
    """With AVX-512 bitsandbytes misreads rows of a multiple of 16 that end inside a block."""
    return inputs % 16 == 0 and inputs % block != 0


def measure_weight(linear: nn.Linear, how: str) -> int:
    """Bytes that bitsandbytes keeps of a Linear's weight, scales included, once it is quantised; its bias is apart.

    Raises `ValueError` if it cannot be quantised so.
    """
    return _SIZES[how](linear.in_features, linear.out_features)


def _measure_4bit(inputs: int, outputs: int) -> int:
    """Two weights a byte, a scale in fp32 a block, and the 16 levels in fp32."""
    weights = inputs * outputs
    return -(-weights // 2) + 4 * -(-weights // _block(inputs)) + 4 * 16


_SIZES: Mapping[str, Callable[[int, int], int]] = {
    "int8": lambda inputs, outputs: inputs * outputs + 4 * outputs,  # a scale in fp32 a row
    "nf4": _measure_4bit,
    "fp4": _measure_4bit,
}
QUANTIZATIONS: Mapping[str, Callable[[Any, nn.Linear], Any]] = {
    "int8": _int8,
    "nf4": partial(_4bit, "nf4"),
    "fp4": partial(_4bit, "fp4"),
}
