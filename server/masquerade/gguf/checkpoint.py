"""A GGUF file as a checkpoint of transformers: its config, and each of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from masquerade.gguf.architectures import ARCHITECTURES, Architecture, Sizes
from masquerade.gguf.file import GgufFile, GgufTensor, read_file
from masquerade.gguf.weight import Weight, is_readable

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"  # without it, the embedding is the head
_FREQUENCIES = "rope_freqs.weight"  # part of the config
_UNKNOWN = (  # would change the answer, and no model of these architectures is known to have them
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
    """What `save_pretrained` would write: a config, and the weights, once each."""

    file: GgufFile
    config: dict[str, Any]
    weights: tuple[Weight, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read all but the weights' values. Raises `UnusableModel` for what cannot be loaded, by key or tensor."""
    file = read_file(path)
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        file.fail("general.architecture", f"is {name!r:.80}; {', '.join(ARCHITECTURES)} can be read")
    architecture = ARCHITECTURES[name]
    _check_whole(file, name)
    sizes = _measure(file, name)
    weights = tuple(_name_weights(file, architecture, sizes))
    _check_complete(file, weights)
    return Checkpoint(file, _configure(file, name, architecture, sizes), weights)


def _check_whole(file: GgufFile, prefix: str) -> None:
    """Refuse what would load and answer wrongly."""
    if (parts := file.size("split.count", 1)) != 1:
        file.fail("split.count", f"is one of {parts} files; make them one with `llama-gguf-split --merge`")
    if f"{prefix}.expert_count" in file.metadata and not file.is_zero(f"{prefix}.expert_count"):
        file.fail(f"{prefix}.expert_count", "mixtures of experts cannot be read")
    for key in _UNKNOWN:
        if f"{prefix}.{key}" in file.metadata:
            file.fail(f"{prefix}.{key}", "is not supported")


def _measure(file: GgufFile, prefix: str) -> Sizes:
    if (embedding := file.tensors.get(_EMBEDDING)) is None:
        file.fail(_EMBEDDING, "is missing")
    hidden, heads = file.size(f"{prefix}.embedding_length"), file.size(f"{prefix}.attention.head_count")
    head = file.size(f"{prefix}.attention.key_length", max(1, hidden // heads))
    sizes = Sizes(
        layers=file.size(f"{prefix}.block_count"),
        hidden=hidden,
        inner=file.size(f"{prefix}.feed_forward_length"),
        heads=heads,
        groups=file.size(f"{prefix}.attention.head_count_kv", heads),
        head=head,
        vocabulary=embedding.shape[0],
    )
    for key, why in (("attention.value_length", "values"), ("rope.dimension_count", "rotary positions")):
        if (found := file.size(f"{prefix}.{key}", head)) != head:
            file.fail(f"{prefix}.{key}", f"is {found}; {why} of another width than the head's {head} cannot be read")
    if head % 2:
        file.fail(f"{prefix}.attention.key_length", f"must be even, not {head}")
    if heads % sizes.groups:
        file.fail(f"{prefix}.attention.head_count_kv", f"{heads} heads are no multiple of {sizes.groups}")
    if sizes.layers > len(file.tensors):
        file.fail(f"{prefix}.block_count", f"is {sizes.layers}, and there are {len(file.tensors)} tensors")
    return sizes


def _name_weights(file: GgufFile, architecture: Architecture, sizes: Sizes) -> Iterator[Weight]:
    yield _find(file, _EMBEDDING, "model.embed_tokens.weight", (sizes.vocabulary, sizes.hidden))
    yield _norm(architecture, _find(file, "output_norm.weight", "model.norm.weight", (sizes.hidden,)))
    if _HEAD in file.tensors:
        yield _find(file, _HEAD, "lm_head.weight", (sizes.vocabulary, sizes.hidden))
    biased = set(architecture.biased).union(*(architecture.biases[key] for key in _find_biases(file, architecture)))
    for layer in range(sizes.layers):
        for stem, name in architecture.layer.items():
            shape = sizes.shape(stem)
            for ending in ("weight", "bias") if stem in biased else ("weight",):
                weight = _find(
                    file,
                    f"blk.{layer}.{stem}.{ending}",
                    f"model.layers.{layer}.{name}.{ending}",
                    shape if ending == "weight" else shape[:1],
                )
                if architecture.interleaved and stem in ("attn_q", "attn_k"):
                    weight = replace(weight, head=sizes.head)
                yield _norm(architecture, weight)


def _norm(architecture: Architecture, weight: Weight) -> Weight:
    shifted = architecture.shifted and weight.name.endswith("norm.weight")
    return replace(weight, offset=1.0) if shifted else weight


def _find_biases(file: GgufFile, architecture: Architecture) -> Iterator[str]:
    """The groups of biases that the file has."""
    return (key for key, stems in architecture.biases.items() if f"blk.0.{stems[0]}.bias" in file.tensors)


def _find(file: GgufFile, stored: str, name: str, shape: tuple[int, ...]) -> Weight:
    tensor = file.tensors.get(stored)
    if tensor is None:
        file.fail(stored, "is missing")
    if tensor.shape != shape:
        file.fail(stored, f"has the shape {list(tensor.shape)!s:.80}, its metadata says {list(shape)}")
    if not is_readable(tensor.kind) or (len(shape) == 1 and not _is_plain(tensor)):
        file.fail(stored, f"is of type {tensor.kind.name}, which cannot be read")
    return Weight(name, shape, file.path, tensor)


def _is_plain(tensor: GgufTensor) -> bool:
    """Whether each value is stored for itself: vectors are read value by value."""
    return tensor.kind.name in ("F32", "F16", "BF16")


def _check_complete(file: GgufFile, weights: tuple[Weight, ...]) -> None:
    unknown = sorted(file.tensors.keys() - {weight.tensor.name for weight in weights} - {_FREQUENCIES})
    if unknown:
        experts = " (mixtures of experts cannot be read)" if "exps" in unknown[0] else ""
        more = f", nor are {len(unknown) - 1} others" if unknown[1:] else ""
        file.fail(unknown[0], f"is not a tensor of this architecture{experts}{more}")


def _configure(file: GgufFile, prefix: str, architecture: Architecture, sizes: Sizes) -> dict[str, Any]:
    biases = set(_find_biases(file, architecture))
    ids = {
        field: file.token(f"tokenizer.ggml.{key}", sizes.vocabulary)
        for field, key in (
            ("bos_token_id", "bos_token_id"),
            ("eos_token_id", "eos_token_id"),
            ("pad_token_id", "padding_token_id"),
        )
    }
    return {
        "model_type": architecture.model_type,
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.head,
        "max_position_embeddings": file.size(f"{prefix}.context_length"),
        "rms_norm_eps": file.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": _HEAD not in file.tensors,
        **{field: field in biases for field in architecture.biases},
        **ids,
        **architecture.configure(file, sizes, prefix),
    }
