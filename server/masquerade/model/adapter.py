"""A mask as an adapter in PEFT's format: a LoRA of pruned input channels, or a SHiRA of single weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedConfig

from maskstore import Mask, Sparse
from masquerade.errors import InvalidValue, UnusableModel
from masquerade.kernels import dense_weight
from masquerade.kernels.native import is_quantised
from masquerade.model.load import Base
from masquerade.model.targets import check_target, find_targets

AdapterKind = Literal["lora", "shira"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of a module's name in PEFT's state dict
# Engines fuse the Linears of a group. Some versions of SGLang load no adapter that has a part of one.
_FUSED = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))


@dataclass(frozen=True)
class ExportedAdapter:
    """The adapter in a folder."""

    kind: AdapterKind
    rank: int  # `r` in its config
    modules: int  # Linears that it has tensors for
    nbytes: int  # of the file of its tensors


def export_adapter(base: Base, mask: Mask, kind: AdapterKind, gamma: float, folder: Path) -> ExportedAdapter:
    """Write a mask at a gamma as an adapter of its base, in the dtype in which the base is loaded.

    The adapter adds -(1 - gamma) W where the mask prunes, so the sum is the weight that is served (eq. 7), up to the
    rounding of that dtype. It holds weights of the base. Raises `MaskMismatch` for targets that the base does not have,
    `UnusableModel` for a base with other names or packed weights, and `InvalidValue` for a gamma out of range, or for a
    mask that has no effect or that the kind cannot express.
    """
    if not 0 <= gamma <= 1:
        raise InvalidValue(f"gamma is {gamma}; it must lie in [0, 1]", param="gamma")
    linears = find_targets(base.model)
    for name, target in mask.targets.items():
        check_target(linears, name, target.shape)
    _check_base(base, linears)
    pruned = {name: target.to_sparse() for name, target in mask.targets.items() if target.pruned}
    if not pruned or gamma == 1:
        why = "its gamma is 1" if pruned else "its mask prunes no weight"
        raise InvalidValue(f"{mask.info.persona!r} is the base, as {why}; an adapter would have no effect")
    make = _make_lora if kind == "lora" else _make_shira
    tensors, rank, config = make(linears, pruned, 1 - gamma, mask.info.persona)
    config = {"base_model_name_or_path": base.name, "task_type": "CAUSAL_LM", "inference_mode": True} | config
    origin = {"persona": mask.info.persona, "mask": mask.digest, "base": mask.base.fingerprint, "gamma": gamma}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt", "masquerade": json.dumps(origin)}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return ExportedAdapter(kind, rank, len(tensors) // 2, (folder / WEIGHTS).stat().st_size)


def _check_base(base: Base, linears: Mapping[str, nn.Linear]) -> None:
    if not base.path.is_file() and "text_config" in PreTrainedConfig.get_config_dict(base.path)[0]:
        raise UnusableModel(
            f"{base.name!r} is a model of text and images, whose modules have other names in other engines than in its "
            "language model, which is what masks apply to; an adapter would have no effect there"
        )
    weights = {name: linear.weight for name, linear in linears.items() if not is_quantised(linear.weight)}
    packed = next((name for name, weight in weights.items() if not weight.is_floating_point()), None)
    if packed:
        raise UnusableModel(
            f"{packed} of {base.name!r} is quantised in its files; an adapter needs weights in floating point, so give "
            "a persona of the unquantised checkpoint"
        )


def _make_lora(
    linears: Mapping[str, nn.Linear], pruned: Mapping[str, Sparse], share: float, persona: str
) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Tensors, rank and config. A [r, in] picks the pruned channels, and B [out, r] is -share W[:, channels].

    All modules have the same r, padded with zeros, and r is alpha, so the scale is 1: llama.cpp divides alpha by each
    tensor's own r, vLLM by the one in the config, and neither reads PEFT's `rank_pattern`. A Linear's name is that of
    its kind, so those in other layers get zeros where they are not pruned.
    """
    channels = _find_channels(pruned, persona)
    rank = max(map(len, channels.values()))
    kinds = {_kind(name) for name in channels}
    kinds |= {kind for group in _FUSED if group & kinds for kind in group}
    adapted = {name: linear for name, linear in linears.items() if _kind(name) in kinds}
    tensors = {}
    for name, linear in adapted.items():
        weight, found = dense_weight(linear), torch.from_numpy(channels.get(name, np.zeros(0, np.int64)))
        a, b = weight.new_zeros(rank, linear.in_features), weight.new_zeros(linear.out_features, rank)
        a[torch.arange(len(found)), found] = 1
        b[:, : len(found)] = -share * weight[:, found].float()
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = a, b
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_kind(name) for name in adapted}),
    }
    return tensors, rank, config


def _find_channels(pruned: Mapping[str, Sparse], persona: str) -> dict[str, NDArray[np.int64]]:
    """The pruned input channels of each module. Raises `InvalidValue` if there are other pruned weights."""
    channels, outside = {}, 0
    for name, target in pruned.items():
        counts = np.bincount(target.cols, minlength=target.columns)
        channels[name] = np.flatnonzero(counts == target.shape[0])
        outside += target.pruned - len(channels[name]) * target.shape[0]
    if outside:
        total = sum(target.pruned for target in pruned.values())
        raise InvalidValue(
            f"{outside} of the {total} weights that {persona!r} prunes are outside of whole input channels, so it is "
            "no LoRA of low rank; build it with `--structure channels`, or export it with `--as shira`"
        )
    return channels


def _make_shira(
    linears: Mapping[str, nn.Linear], pruned: Mapping[str, Sparse], share: float, persona: str
) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Tensors, rank and config: the values -share W, and their indices [2, values], int32.

    PEFT expects r (in + out) values in every module, with one r for all; the rest are zeros at the first weight. The
    type of the mask is none that PEFT has, so that it computes no random mask before it reads the indices.
    """
    rank = max(-(-target.pruned // sum(target.shape)) for target in pruned.values())
    tensors = {}
    for name, target in pruned.items():
        out, columns = target.shape
        if (most := out * columns // (out + columns)) < rank:
            raise InvalidValue(
                f"{persona!r} prunes too much for SHiRA, which has the same r in all modules: the densest one needs "
                f"{rank}, and {name} has room for {most}; a mask that prunes fewer weights can be exported"
            )
        places = np.zeros((2, rank * (out + columns)), np.int32)
        places[0, : target.pruned] = np.repeat(np.arange(out), np.diff(target.rows))
        places[1, : target.pruned] = target.cols
        rows, cols = torch.from_numpy(places).long()
        weight = dense_weight(linears[name])
        values = -share * weight[rows, cols].float()
        values[target.pruned :] = 0
        tensors[f"{_PREFIX}{name}.shira_weight"] = values.to(weight.dtype)
        tensors[f"{_PREFIX}{name}.shira_indices"] = torch.from_numpy(places)
    return tensors, rank, {"peft_type": "SHIRA", "r": rank, "mask_type": "pruned", "target_modules": sorted(pruned)}


def _kind(name: str) -> str:
    """The last part of a module's name, such as `q_proj`."""
    return name.rpartition(".")[2]
