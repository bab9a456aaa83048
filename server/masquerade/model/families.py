"""The families of models that are served, and how long their requests may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from masquerade.errors import UnusableModel, quote

# transformers' model type -> its families; tests/test_families.py serves each and builds masks in it
FAMILIES: Mapping[str, str] = {
    "llama": "Llama 1 to 3.3, SmolLM2",
    "llama4_text": "Llama 4",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "ministral": "Ministral",
    "ministral3": "Ministral 3",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3 MoE",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi": "Phi-1, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoeshared": "Granite MoE with a shared expert",
    "olmo": "OLMo 1",
    "olmoe": "OLMoE",
    "cohere": "Command R",
    "cohere2": "Command R7B",
    "glm4": "GLM-4",
    "exaone4": "EXAONE 4",
    "seed_oss": "Seed-OSS",
    "ernie4_5": "ERNIE 4.5",
    "hunyuan_v1_dense": "Hunyuan",
    "apertus": "Apertus",
    "starcoder2": "StarCoder2",
    "gpt_oss": "gpt-oss",
}


def refuse(name: str, model_type: str) -> NoReturn:
    """Raise `UnusableModel` for a model of another family, with a list of those that are served.

    A Llama-shaped config is not enough. In transformers 5.23, DiffLlama and Doge have one and compute attention
    in their own code, so that a packed batch would get wrong answers and no error.
    """
    served = "; ".join(f"{names} ({model_type})" for model_type, names in FAMILIES.items())
    raise UnusableModel(
        f"{name!r} is a {quote(model_type)} model, which is not supported. Supported families: {served}"
    )


def find_context(config: Any) -> int:
    """Most positions of a request.

    Those of the config; fewer where transformers reads a request's position from its batch: it chooses LongRoPE's
    frequencies by the longest request, and Llama 4's attention temperature by the place in the batch.
    """
    limits = [config.max_position_embeddings]
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    if getattr(config, "attn_temperature_tuning", False):
        limits.append(config.floor_scale - 1)
    return int(min(limits))
