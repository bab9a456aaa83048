"""Loads a base model: the embedded demo, a local folder, or a model of the hub.

Knows devices, dtypes and which models can wear masks. Refuses to know about personas and requests. Only
safetensors weights are read; a checkpoint's own code is never run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskstore import MaskError, fingerprint
from masquerade.errors import UnusableModel
from masquerade.model.quantized import quantize
from masquerade.model.targets import find_targets
from masquerade.sources import find_folder, name_model


@dataclass(frozen=True)
class Base:
    """A loaded base model and what identifies it."""

    name: str  # the model id of the API
    folder: Path
    fingerprint: str
    model: Any  # a transformers causal language model, in eval mode
    tokenizer: Any
    context: int  # most positions a request may use
    ends: frozenset[int]  # token ids that end an answer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has an embedding for."""
        return int(self.model.config.vocab_size)


def load(name: str, *, device: str = "auto", dtype: str = "auto", quantization: str | None = None) -> Base:
    """Load `demo`, a folder, or a hub id, ready for inference.

    `device` is `auto`, `cpu` or `cuda`; `dtype` is `auto` (fp32 on a CPU, the checkpoint's on a GPU), `float32`,
    `bfloat16` or `float16`; `quantization` is a name in `QUANTIZATIONS`. Raises `UnusableModel` with the reason.
    """
    where = _choose_device(device)
    folder = find_folder(name)
    try:
        mark = fingerprint(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=_choose_dtype(dtype, where), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, MaskError) as error:
        raise UnusableModel(f"cannot load a model from {name!r}: {error}") from error
    if not find_targets(model):
        kind = model.config.model_type
        raise UnusableModel(f"{name!r} is a {kind!r} model; masks need Llama-shaped attention and MLP Linears")
    if quantization:
        quantize(model, quantization, where)
    return Base(
        name=name_model(name),
        folder=folder,
        fingerprint=mark,
        model=model.to(where).eval().requires_grad_(False),
        tokenizer=tokenizer,
        context=int(model.config.max_position_embeddings),
        ends=_ends(model, tokenizer),
    )


def _choose_device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UnusableModel("device `cuda` was asked for, but torch sees no CUDA device")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")


def _choose_dtype(dtype: str, device: torch.device) -> Any:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    if declared is None:
        declared = tokenizer.eos_token_id
    return frozenset(declared if isinstance(declared, list) else [] if declared is None else [declared])
