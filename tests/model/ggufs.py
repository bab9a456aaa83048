"""GGUF files for tests, written with gguf's own writer and tensor names as llama.cpp's convert_hf_to_gguf.py does it.

Shares no code with what it tests: what llama.cpp does to a weight is done here forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    TokenType,
    get_tensor_name_map,
    quants,
)
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from tests import world
from tests.model import gguf_blocks

Kind = GGMLQuantizationType
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w"), ("\u0120", "\u0120")]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
_SHIFTED = ("gemma", "gemma2", "gemma3_text")
_PERMUTED = ("llama", "smollm3", "granite")  # the converters that are subclasses of `LlamaModel`
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # where llama.cpp has another name than transformers


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens, the special ones first, and what kind each is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*world.SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    return tokens, [TokenType.CONTROL if token in world.SPECIAL else TokenType.NORMAL for token in tokens]


def make_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in bfloat16 with weights that tell mistakes apart, norms and biases too."""
    torch.manual_seed(seed)
    names = {"vocab_size": len(vocabulary()[0]), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **(SHAPE | names | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            large = 0.1 if parameter.ndim == 2 else 0.3
            centre = 1.0 if name.endswith("norm.weight") and model_type not in _SHIFTED else 0.0
            parameter.copy_(centre + large * torch.randn(parameter.shape))
    return model.eval()


def permute(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """As `LlamaModel.permute` of convert_hf_to_gguf.py."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def restore(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse, found by where each row went."""
    went = permute(np.arange(len(weights)), heads)
    restored = np.empty_like(weights)
    restored[went] = weights
    return restored


@dataclass(frozen=True)
class Written:
    """A GGUF file, and what it should be loaded as."""

    path: Path
    expected: Mapping[str, torch.Tensor]  # in bfloat16


Pack = Callable[[str, NDArray[np.float32]], tuple[NDArray[Any], Kind]]


def quantise(kind: Kind) -> Pack:
    """Matrices in a type, and vectors in F32, as llama.cpp's tools write them."""

    def pack(_: str, weights: NDArray[np.float32]) -> tuple[NDArray[Any], Kind]:
        chosen = gguf_blocks.choose(kind, weights.shape[-1]) if weights.ndim == 2 else Kind.F32
        return gguf_blocks.quantise(weights, chosen), chosen

    return pack


_PLAIN = quantise(Kind.F32)


def write(
    path: Path,
    model: Any,
    pack: Pack = _PLAIN,
    *,
    change: Callable[[GGUFWriter], None] | None = None,
    leave_out: Sequence[str] = (),
    tokenizer: Callable[[GGUFWriter], None] | None = None,
) -> Written:
    """Write a model of transformers. `leave_out` are keys and tensors; `change` has the last word on the metadata."""
    config = model.config
    name = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, name)
    _add_sizes(writer, config)
    (tokenizer or add_tokenizer)(writer)
    if change:
        change(writer)
    for key in leave_out:
        writer.kv_data[0].pop(key, None)
    architecture = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name)
    expected = _add_tensors(writer, model, architecture, pack, leave_out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, expected)


def _add_sizes(writer: GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    _ROPES[rope["rope_type"]](writer, rope, head)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_linear(writer: GGUFWriter, rope: Mapping[str, Any], _: int) -> None:
    writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
    writer.add_rope_scaling_factor(rope["factor"])


def _add_yarn(writer: GGUFWriter, rope: Mapping[str, Any], _: int) -> None:
    writer.add_string(f"{writer.arch}.rope.scaling.type", "yarn")
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_llama3(writer: GGUFWriter, rope: Mapping[str, Any], head: int) -> None:
    """As `LlamaModel.generate_extra_tensors` of convert_hf_to_gguf.py."""
    context = rope["original_max_position_embeddings"]
    long, short = context / rope["low_freq_factor"], context / rope["high_freq_factor"]
    factors = []
    for place in range(0, head, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (place / head)
        smooth = (context / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        middle = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if wave < short else rope["factor"] if wave > long else middle)
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


_ROPES: Mapping[str, Callable[[GGUFWriter, Mapping[str, Any], int], None]] = {
    "default": lambda *_: None,
    "linear": _add_linear,
    "yarn": _add_yarn,
    "llama3": _add_llama3,
}


def add_tokenizer(writer: GGUFWriter) -> None:
    """Bytes and a few merges, with the chat template of `tests.world`."""
    tokens, kinds = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(world.TEMPLATE)


def _add_tensors(
    writer: GGUFWriter, model: Any, architecture: MODEL_ARCH, pack: Pack, leave_out: Sequence[str]
) -> dict[str, torch.Tensor]:
    config, names = model.config, get_tensor_name_map(architecture, model.config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    expected = {}
    for full, parameter in model.named_parameters():
        name, ending = full.rsplit(".", 1)
        stored = f"{names.get_name(name)}.{ending}"
        values = parameter.detach().float().numpy()
        turned = heads.get(name.rpartition(".")[2], 0) if writer.arch in _PERMUTED else 0
        shift = np.float32(config.model_type in _SHIFTED and full.endswith("norm.weight"))
        data, kind = pack(full, permute(values, turned) if turned else values + shift)
        back = quants.dequantize(data, kind).reshape(values.shape) - shift
        expected[full] = torch.from_numpy(restore(back, turned) if turned else back).to(torch.bfloat16)
        if stored not in leave_out:
            writer.add_tensor(stored, data, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    return expected


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Give a new file all keys of another, in place of those that it has."""
    writer.kv_data[0].clear()
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            kind, of_items = [*field.types, None][:2]
            writer.add_key_value(field.name, field.contents(), kind, of_items)


def write_parts(path: Path, tensors: int, folder: Path, *, bare_first: bool = False) -> list[Path]:
    """Write the parts of a file, of so many tensors each, as llama.cpp's gguf-split writes them.

    With `bare_first`, the first part has the metadata and no tensor (`--no-tensor-first-split`).
    """
    reader = GGUFReader(path)
    shares = [reader.tensors[begin : begin + tensors] for begin in range(0, len(reader.tensors), tensors)]
    shares = [[], *shares] if bare_first else shares
    paths = []
    for number, share in enumerate(shares):
        name = f"{path.stem}-{number + 1:05d}-of-{len(shares):05d}.gguf"
        writer = GGUFWriter(folder / name, "none")
        writer.kv_data[0].clear()
        if number == 0:
            copy_metadata(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(shares))
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in share:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(folder / name)
    return paths
