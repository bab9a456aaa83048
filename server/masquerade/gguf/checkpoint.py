"""A GGUF file as a transformers checkpoint: config and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from masquerade.gguf.architectures import ARCHITECTURES, FREQUENCIES, Architecture, Sizes
from masquerade.gguf.file import GgufFile
from masquerade.gguf.parts import read_parts
from masquerade.gguf.weight import Weight, is_readable

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"  # without it, the embedding is tied
_VALUES = ("F32", "F16", "BF16")  # types without blocks; vectors are read value by value
_UNSUPPORTED = (  # they would change the answers; no known model of these architectures has them
    "attention.scale",
    "attention.clamp_kqv",
    "logit_scale",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)


@dataclass(frozen=True)
class Checkpoint:
    """The content of `save_pretrained`: the config, and each weight once."""

    file: GgufFile
    config: dict[str, Any]
    weights: tuple[Weight, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read everything but the values of a GGUF file, or of all parts if `path` is one of them.

    Raises `UnusableModel`, which names the key or tensor at fault.
    """
    file = read_parts(path)
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        file.fail("general.architecture", f"is {name!r:.80}; supported: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    _check_whole(file, name, architecture)
    sizes = _measure(file, name)
    weights = tuple(_name_weights(file, architecture, sizes))
    _check_complete(file, weights)
    return Checkpoint(file, _configure(file, name, architecture, sizes), weights)


def _check_whole(file: GgufFile, prefix: str, architecture: Architecture) -> None:
    """Raise for files that would load and give wrong answers."""
    if f"{prefix}.expert_count" in file.metadata and not file.is_zero(f"{prefix}.expert_count"):
        file.fail(f"{prefix}.expert_count", "mixtures of experts are not supported")
    if not file.flag(f"{prefix}.attention.causal", True):
        file.fail(f"{prefix}.attention.causal", "is false: the model embeds text, and cannot continue one")
    for key in _UNSUPPORTED:
        if key not in architecture.scales.values() and f"{prefix}.{key}" in file.metadata:
            file.fail(f"{prefix}.{key}", "is not supported")


def _measure(file: GgufFile, prefix: str) -> Sizes:
    if (embedding := file.tensors.get(_EMBEDDING)) is None:
        file.fail(_EMBEDDING, "is missing")
    hidden_size, num_heads = file.size(f"{prefix}.embedding_length"), file.size(f"{prefix}.attention.head_count")
    head_dim = file.size(f"{prefix}.attention.key_length", max(1, hidden_size // num_heads))
    sizes = Sizes(
        num_layers=file.size(f"{prefix}.block_count"),
        hidden_size=hidden_size,
        intermediate_size=file.size(f"{prefix}.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=file.size(f"{prefix}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
    )
    for key, why in (("attention.value_length", "values"), ("rope.dimension_count", "rotary positions")):
        if (found := file.size(f"{prefix}.{key}", head_dim)) != head_dim:
            file.fail(f"{prefix}.{key}", f"is {found}; {why} must have the head's width of {head_dim}")
    if head_dim % 2:
        file.fail(f"{prefix}.attention.key_length", f"must be even, not {head_dim}")
    if num_heads % sizes.num_kv_heads:
        file.fail(f"{prefix}.attention.head_count_kv", f"{num_heads} heads are not a multiple of {sizes.num_kv_heads}")
    if sizes.num_layers > len(file.tensors):
        file.fail(f"{prefix}.block_count", f"is {sizes.num_layers}, but the file has only {len(file.tensors)} tensors")
    return sizes


def _name_weights(file: GgufFile, architecture: Architecture, sizes: Sizes) -> Iterator[Weight]:
    yield _find(file, _EMBEDDING, "model.embed_tokens.weight", (sizes.vocab_size, sizes.hidden_size))
    yield _norm(architecture, _find(file, "output_norm.weight", "model.norm.weight", (sizes.hidden_size,)))
    if _HEAD in file.tensors:
        yield _find(file, _HEAD, "lm_head.weight", (sizes.vocab_size, sizes.hidden_size))
    biased = set(architecture.biased).union(*(architecture.biases[key] for key in _find_biases(file, architecture)))
    for layer in range(sizes.num_layers):
        for stem, name in architecture.layer.items():
            shape = sizes.shape(stem, architecture.normed_whole)
            for ending in ("weight", "bias") if stem in biased else ("weight",):
                weight = _find(
                    file,
                    f"blk.{layer}.{stem}.{ending}",
                    f"model.layers.{layer}.{name}.{ending}",
                    shape if ending == "weight" else shape[:1],
                )
                if architecture.interleaved and stem in ("attn_q", "attn_k"):
                    weight = replace(weight, head_dim=sizes.head_dim)
                yield _norm(architecture, weight)


def _norm(architecture: Architecture, weight: Weight) -> Weight:
    shifted = architecture.shifted and weight.name.endswith("norm.weight")
    return replace(weight, offset=1.0) if shifted else weight


def _find_biases(file: GgufFile, architecture: Architecture) -> Iterator[str]:
    """The config fields of the biases in the file."""
    return (key for key, stems in architecture.biases.items() if f"blk.0.{stems[0]}.bias" in file.tensors)


def _find(file: GgufFile, stored: str, name: str, shape: tuple[int, ...]) -> Weight:
    tensor = file.tensors.get(stored)
    if tensor is None:
        file.fail(stored, "is missing")
    if tensor.shape != shape:
        file.fail(stored, f"has the shape {list(tensor.shape)!s:.80}; the metadata says {list(shape)}")
    if not is_readable(tensor.kind) or (len(shape) == 1 and tensor.kind.name not in _VALUES):
        file.fail(stored, f"is of type {tensor.kind.name}, which is not supported")
    return Weight(name, shape, tensor)


def _check_complete(file: GgufFile, weights: tuple[Weight, ...]) -> None:
    unknown = sorted(file.tensors.keys() - {weight.tensor.name for weight in weights} - {FREQUENCIES})
    if unknown:
        experts = " (mixtures of experts are not supported)" if "exps" in unknown[0] else ""
        more = f", nor are {len(unknown) - 1} others" if unknown[1:] else ""
        file.fail(unknown[0], f"is not a tensor of this architecture{experts}{more}")


def _configure(file: GgufFile, prefix: str, architecture: Architecture, sizes: Sizes) -> dict[str, Any]:
    biases = set(_find_biases(file, architecture))
    ids = {
        field: file.token(f"tokenizer.ggml.{key}", sizes.vocab_size)
        for field, key in (
            ("bos_token_id", "bos_token_id"),
            ("eos_token_id", "eos_token_id"),
            ("pad_token_id", "padding_token_id"),
        )
    }
    return {
        "model_type": architecture.model_type,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": file.size(f"{prefix}.context_length"),
        "rms_norm_eps": file.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": _HEAD not in file.tensors,
        **{field: field in biases for field in architecture.biases},
        **{field: file.number(f"{prefix}.{key}") for field, key in architecture.scales.items()},
        **ids,
        **architecture.configure(file, sizes, prefix),
    }
