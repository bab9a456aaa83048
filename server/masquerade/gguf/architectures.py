"""The supported architectures: names of their tensors, and transformers' config from their metadata.

llama.cpp's convert_hf_to_gguf.py defines names and layouts; llama.cpp's loader defines the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masquerade.gguf.file import GgufFile

FREQUENCIES = "rope_freqs.weight"  # a tensor that is part of the config

Config = dict[str, Any]
_ORIGINAL_CONTEXT = 8192  # of every Llama 3; the GGUF file does not have it


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def shape(self, stem: str, normed_whole: bool = False) -> tuple[int, ...]:
        """The shape of a layer's weight; `stem` is its GGUF name without layer and `.weight`.

        With `normed_whole`, queries and keys are normed over all heads, otherwise each head alone.
        """
        if stem.endswith(("q_norm", "k_norm")):
            return self.shape(stem.removesuffix("_norm"))[:1] if normed_whole else (self.head_dim,)
        return _SHAPES[stem](self) if stem in _SHAPES else (self.hidden_size,)


_SHAPES: Mapping[str, Callable[[Sizes], tuple[int, int]]] = {
    "attn_q": lambda sizes: (sizes.num_heads * sizes.head_dim, sizes.hidden_size),
    "attn_k": lambda sizes: (sizes.num_kv_heads * sizes.head_dim, sizes.hidden_size),
    "attn_v": lambda sizes: (sizes.num_kv_heads * sizes.head_dim, sizes.hidden_size),
    "attn_output": lambda sizes: (sizes.hidden_size, sizes.num_heads * sizes.head_dim),
    "ffn_gate": lambda sizes: (sizes.intermediate_size, sizes.hidden_size),
    "ffn_up": lambda sizes: (sizes.intermediate_size, sizes.hidden_size),
    "ffn_down": lambda sizes: (sizes.hidden_size, sizes.intermediate_size),
}


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    model_type: str  # transformers' name
    layer: Mapping[str, str]  # tensors of a layer: GGUF's names and transformers', without `.weight`
    configure: Callable[[GgufFile, Sizes, str], Config]  # its own part of the config
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by field of the config
    biased: tuple[str, ...] = ()  # tensors that always have a bias
    interleaved: bool = False  # llama.cpp interleaves the rows of the halves of each query and key head
    shifted: bool = False  # llama.cpp stores 1 + the weights of norms
    normed_whole: bool = False  # queries and keys are normed over all heads
    scales: Mapping[str, str] = field(default_factory=dict)  # fields of the config, and their keys


_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMED_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMED_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_NORMED_TWICE = {"ffn_norm": "pre_feedforward_layernorm"} | _NORMED_AFTER


_LLAMA_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}


def _llama(file: GgufFile, sizes: Sizes, prefix: str) -> Config:
    rope = _scale_rope(file, prefix)
    if FREQUENCIES in file.tensors:
        if rope["rope_type"] != "default":
            file.fail(FREQUENCIES, f"is not supported together with {rope['rope_type']} scaling of positions")
        rope = _llama3(file, sizes, prefix, rope["rope_theta"])
    return {"rope_parameters": rope}


def _mistral(file: GgufFile, _: Sizes, prefix: str) -> Config:
    return {
        "rope_parameters": _rope(file, prefix),
        "sliding_window": file.size(f"{prefix}.attention.sliding_window", None),
    }


def _plain(file: GgufFile, _: Sizes, prefix: str) -> Config:
    return {"rope_parameters": _rope(file, prefix)}


def _smollm3(file: GgufFile, sizes: Sizes, prefix: str) -> Config:
    """No file says which layers are without positions; llama.cpp has it of the architecture."""
    return _llama(file, sizes, prefix) | {"no_rope_layer_interval": 4}


def _olmo2(file: GgufFile, _: Sizes, prefix: str) -> Config:
    key = f"{prefix}.attention.sliding_window"
    if key in file.metadata:
        file.fail(key, "is OLMo 3's, which is not supported in GGUF; load its safetensors")
    return {"rope_parameters": _rope(file, prefix)}


def _gemma2(file: GgufFile, sizes: Sizes, prefix: str) -> Config:
    return {
        "rope_parameters": _rope(file, prefix),
        "sliding_window": file.size(f"{prefix}.attention.sliding_window", 4096),
        "attn_logit_softcapping": file.number(f"{prefix}.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number(f"{prefix}.final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _scale(sizes, largest=46),
    }


def _gemma3(file: GgufFile, sizes: Sizes, prefix: str) -> Config:
    pattern = file.size(f"{prefix}.attention.sliding_window_pattern", 6)
    local = file.number(f"{prefix}.rope.freq_base_swa", 10_000.0)
    return {
        "rope_parameters": {
            "full_attention": _rope(file, prefix, base=1_000_000.0),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "sliding_window": file.size(f"{prefix}.attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(sizes.num_layers)
        ],
        "final_logit_softcapping": file.number(f"{prefix}.final_logit_softcapping", None),
        "query_pre_attn_scalar": _scale(sizes, largest=62),
    }


def _scale(sizes: Sizes, largest: int) -> int:
    """Gemma's attention scale; the largest model of each version, identified by its number of layers, has its own."""
    return sizes.hidden_size // sizes.num_heads if sizes.num_layers == largest else sizes.head_dim


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        _LAYER,
        _llama,
        biases=_LLAMA_BIASES,
        interleaved=True,
    ),
    "smollm3": Architecture("smollm3", _LAYER, _smollm3, biases=_LLAMA_BIASES, interleaved=True),
    "granite": Architecture(
        "granite",
        _LAYER,
        _llama,
        biases=_LLAMA_BIASES,
        interleaved=True,
        scales={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "olmo2": Architecture(
        "olmo2",
        {name: _LAYER[name] for name in _LAYER if not name.endswith("norm")} | _NORMED_HEADS | _NORMED_AFTER,
        _olmo2,
        normed_whole=True,
    ),
    "mistral": Architecture("mistral", _LAYER, _mistral, interleaved=True),
    "qwen2": Architecture("qwen2", _LAYER, _plain, biased=("attn_q", "attn_k", "attn_v")),
    "qwen3": Architecture("qwen3", _LAYER | _NORMED_HEADS, _plain),
    "gemma": Architecture("gemma", _LAYER, _plain, shifted=True),
    "gemma2": Architecture("gemma2", _LAYER | _NORMED_TWICE, _gemma2, shifted=True),
    "gemma3": Architecture("gemma3_text", _LAYER | _NORMED_TWICE | _NORMED_HEADS, _gemma3, shifted=True),
}


def _rope(file: GgufFile, prefix: str, base: float = 10_000.0) -> Config:
    """The RoPE parameters of an architecture without frequencies of its own."""
    if FREQUENCIES in file.tensors:
        file.fail(FREQUENCIES, "is not supported for this architecture")
    return _scale_rope(file, prefix, base)


def _scale_rope(file: GgufFile, prefix: str, base: float = 10_000.0) -> Config:
    """The RoPE parameters with the file's scaling: linear, as in llama.cpp, if there is a factor and no type."""
    common = {"rope_theta": file.number(f"{prefix}.rope.freq_base", base)}
    factors = (f"{prefix}.rope.scaling.factor", f"{prefix}.rope.scale_linear")
    usual = "linear" if any(key in file.metadata and file.number(key) for key in factors) else "none"
    kind = file.text(f"{prefix}.rope.scaling.type", usual)
    if kind not in _SCALINGS:
        file.fail(f"{prefix}.rope.scaling.type", f"is {kind!r:.80}; supported: {', '.join(_SCALINGS)}")
    return common | _SCALINGS[kind](file, f"{prefix}.rope.scaling")


def _linear(file: GgufFile, key: str) -> Config:
    older = f"{key.removesuffix('.scaling')}.scale_linear"
    used = older if f"{key}.factor" not in file.metadata and older in file.metadata else f"{key}.factor"
    return {"rope_type": "linear", "factor": file.number(used)}


def _yarn(file: GgufFile, key: str) -> Config:
    optional = {
        "beta_fast": file.number(f"{key}.yarn_beta_fast", None),
        "beta_slow": file.number(f"{key}.yarn_beta_slow", None),
    }
    return {
        "rope_type": "yarn",
        "factor": file.number(f"{key}.factor"),
        "original_max_position_embeddings": file.size(f"{key}.original_context_length"),
    } | {name: value for name, value in optional.items() if value is not None}


_SCALINGS: Mapping[str, Callable[[GgufFile, str], Config]] = {
    "none": lambda _file, _key: {"rope_type": "default"},
    "linear": _linear,
    "yarn": _yarn,
}


def _llama3(file: GgufFile, sizes: Sizes, prefix: str, theta: float) -> Config:
    """Llama 3's RoPE parameters, from the divisors of the frequencies in the file."""
    tensor = file.tensors[FREQUENCIES]
    if tensor.shape != (sizes.head_dim // 2,) or tensor.kind.name != "F32":
        file.fail(
            FREQUENCIES,
            f"is {tensor.kind.name} of the shape {list(tensor.shape)}; expected F32 [{sizes.head_dim // 2}]",
        )
    factors = tensor.map().view("<f4")
    config = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": file.size(
            f"{prefix}.rope.scaling.original_context_length", _ORIGINAL_CONTEXT
        ),
    }
    if not np.allclose(factors, divide_llama3(config, sizes.head_dim), rtol=1e-4):
        file.fail(FREQUENCIES, "is not the scaling of Llama 3.1 to 3.3, the only one that is supported")
    return config


def divide_llama3(config: Config, head_dim: int) -> NDArray[np.float64]:
    """The divisor of each frequency of a head for `rope_type: llama3`."""
    low, high = config["low_freq_factor"], config["high_freq_factor"]
    frequencies = config["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    rotations = config["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    divided: NDArray[np.float64] = 1 / ((1 - smooth) / config["factor"] + smooth)
    return divided
