"""A small random model of every supported family, with the traits by which it differs from a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import world

WINDOW = 24  # of sliding windows and chunks of attention, shorter than the tests' prompts
SHAPE: Mapping[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 16}  # heads that are not hidden_size / num_attention_heads wide
ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [4.0, 9.0],
    "original_max_position_embeddings": 128,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# by the name in docs/bases.md: transformers' model type, and what of its config differs from SHAPE
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {"num_key_value_heads": 4}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Llama 4": (
        "llama4_text",
        WIDE
        | {
            "intermediate_size_mlp": 48,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": WINDOW,
            "attn_temperature_tuning": True,
        },
    ),
    "Llama 4 MoE": (
        "llama4_text",
        WIDE
        | {
            "intermediate_size_mlp": 48,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
        },
    ),
    "Mistral": ("mistral", WIDE | {"sliding_window": WINDOW}),
    "Mixtral": ("mixtral", EXPERTS | {"sliding_window": WINDOW}),
    "Ministral": ("ministral", WIDE | ALTERNATE),
    "Ministral 3": ("ministral3", WIDE | {"rope_parameters": YARN}),
    "Qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}),
    "Qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen MoE": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [0],
        },
    ),
    "Qwen3": ("qwen3", WIDE | {"tie_word_embeddings": True}),
    "Qwen3 MoE": ("qwen3_moe", WIDE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Gemma 1": ("gemma", WIDE),
    "Gemma 2": (
        "gemma2",
        WIDE
        | ALTERNATE
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 24},
    ),
    "Gemma 3": (
        "gemma3_text",
        WIDE | ALTERNATE | {"rope_parameters": GEMMA3_ROPES, "query_pre_attn_scalar": 24},
    ),
    "Phi-2": ("phi", {}),
    "Phi-3": ("phi3", {"sliding_window": WINDOW}),
    "Phi-4 mini": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128, "tie_word_embeddings": True},
    ),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", ALTERNATE),
    "Granite": ("granite", GRANITE),
    "Granite MoE": ("granitemoe", GRANITE | EXPERTS),
    "Granite MoE with a shared expert": ("granitemoeshared", GRANITE | EXPERTS | {"shared_intermediate_size": 24}),
    "OLMo": ("olmo", {"clip_qkv": 2.0}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Command R": ("cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    "Command R7B": ("cohere2", WIDE | ALTERNATE | {"logit_scale": 0.5}),
    "GLM-4": ("glm4", WIDE),
    "EXAONE 4": ("exaone4", WIDE | ALTERNATE),
    "Seed-OSS": ("seed_oss", WIDE | {"attention_bias": True}),
    "ERNIE 4.5": ("ernie4_5", WIDE | {"use_bias": True, "tie_word_embeddings": True}),
    "Hunyuan": ("hunyuan_v1_dense", WIDE),
    "Apertus": ("apertus", {}),
    "StarCoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gpt-oss": ("gpt_oss", WIDE | ALTERNATE | EXPERTS),
}


def has_experts(changes: Mapping[str, Any]) -> bool:
    """Whether a family's config asks for a mixture of experts."""
    return any("experts" in key for key in changes)


def make_config(name: str, **changes: Any) -> Any:
    """The config of a family's model."""
    model_type, own = FAMILIES[name]
    return AutoConfig.for_model(model_type, **(SHAPE | own | changes))


def make_family(folder: Path, name: str, **changes: Any) -> Path:
    """Write a random model of a family. Norms and biases are random too, so that an ignored one changes tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name, **changes))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                size = (0.2 if model.config.tie_word_embeddings else 1.0) if "embed" in parameter_name else 0.25
                parameter.copy_(size * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    world.make_tokenizer().save_pretrained(folder)
    return folder
