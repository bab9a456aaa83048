"""A model's outline: its config, and its modules without values, on torch's `meta` device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from maskstore import MaskNotFound, list_tensors
from masquerade.errors import MasqueradeError, UnusableModel
from masquerade.gguf import Checkpoint
from masquerade.kernels import quantised
from masquerade.kernels.native import find_library
from masquerade.model import find_targets
from masquerade.model.dequantized import find_kept
from masquerade.model.families import find_context
from masquerade.model.load import keeps_blocks, read_config
from masquerade.model.quantized import check_stored
from masquerade.sources import ModelFiles

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Outline:
    """A model as it would be loaded on a device, without its values."""

    name: str
    model: Any  # a transformers causal language model on the meta device, in the dtype that it is served in
    device: str  # `cpu` or `cuda`: where it is to be
    context: int  # most positions of a request
    files: Mapping[str, int]  # bytes of the weights in the files, by their type; empty if they are not there
    is_gguf: bool
    keeps: bool = False  # whether weights of a GGUF file stay in its blocks without a quantisation
    stored: str | None = None  # how the weights are quantised in the files: a name in `QUANTIZATIONS`
    saved: int = 0  # bytes by which weights that can stay there are smaller than in this dtype

    @property
    def config(self) -> Any:
        """transformers' config of the decoder."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that are not quantised."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def is_mapped(self) -> bool:
        """Whether the files hold the weights as they are served, so that a CPU can read them from the mapped files."""
        return not self.is_gguf and {_DTYPES.get(kind) for kind in self.files} == {self.dtype}

    @cached_property
    def linears(self) -> Mapping[str, nn.Linear]:
        """The maskable Linears by name."""
        return find_targets(self.model)

    @property
    def maskable(self) -> int:
        """Number of weights of the maskable Linears."""
        return sum(linear.weight.numel() for linear in self.linears.values())

    @property
    def parameters(self) -> int:
        """Number of weights; a head that is tied to the embedding is no second one."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def read_outline(files: ModelFiles, device: str, dtype: str = "auto") -> Outline:
    """The outline of a model that would be loaded on `device` (`cpu` or `cuda`); `dtype` is that of `model.load`.

    It reads config.json and the headers of safetensors files, or a GGUF file's header, and no weights. The weights of a
    folder may be missing. Raises `UnusableModel` for files that do not describe a model that masks apply to.
    """
    try:
        config, sizes, stored_dtype, stored = (
            (*_read_gguf(files.checkpoint), None) if files.is_gguf else _read_folder(files)
        )
        wanted = _choose_dtype(dtype, device, files.is_gguf, stored_dtype)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
        model.tie_weights()
        if not find_targets(model):
            kind = config.model_type
            raise UnusableModel(
                f"{files.name!r} is a {kind!r} model; masks need Llama-shaped attention and MLP Linears"
            )
        context = find_context(model.config)
    except MasqueradeError:
        raise
    except Exception as error:  # transformers checks a config in parts; a wrong one may raise anything
        raise UnusableModel(f"the header of {files.name!r} cannot be read: {str(error) or repr(error)}") from error
    can_keep = files.is_gguf and device == "cpu" and wanted is torch.bfloat16 and find_library() is not None
    saved = _measure_saved(model, files.checkpoint) if can_keep else 0
    keeps = saved > 0 and keeps_blocks(device, dtype, None)
    return Outline(files.name, model, device, context, sizes, files.is_gguf, keeps, stored, saved)


def _measure_saved(model: Any, checkpoint: Checkpoint) -> int:
    kept = [weight for weight, _ in find_kept(model, checkpoint)]
    return sum(weight.nbytes - quantised.measure(weight.tensor.kind.name, *weight.shape) for weight in kept)


def _read_gguf(checkpoint: Checkpoint) -> tuple[Any, dict[str, int], torch.dtype]:
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.file.tensors.values():
        sizes[tensor.kind.name] += tensor.nbytes
    return AutoConfig.for_model(**checkpoint.config), dict(sizes), torch.bfloat16


def _read_folder(files: ModelFiles) -> tuple[Any, dict[str, int], torch.dtype, str | None]:
    try:
        tensors = list_tensors(files.path)
        sizes = Counter[str]()
        for tensor in tensors:
            sizes[tensor.dtype] += tensor.nbytes
    except MaskNotFound:  # the config alone tells the shapes
        tensors, sizes = (), Counter(_read_index(files.path / _INDEX))
    found, _ = PreTrainedConfig.get_config_dict(files.path, local_files_only=True)
    quantised = check_stored(files.name, found, (tensor.name for tensor in tensors))
    config, _ = read_config(files.name, files.path)
    stored = next((_DTYPES[kind] for kind in sizes if kind in _DTYPES), torch.float32)
    return config, dict(sizes), config.dtype or stored, quantised


def _read_index(path: Path) -> dict[str, int]:
    """The bytes that an index of shards claims, of no known type."""
    if not path.is_file():
        return {}
    total = json.loads(path.read_bytes()).get("metadata", {}).get("total_size")
    return {"index": total} if isinstance(total, int) else {}


def _choose_dtype(dtype: str, device: str, is_gguf: bool, stored: torch.dtype) -> torch.dtype:
    """As `model.load` chooses: `auto` is the checkpoint's, but float32 for a folder on a CPU."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    return torch.float32 if device == "cpu" and not is_gguf else stored
