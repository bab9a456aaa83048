"""What vLLM calls at its start: checks its shape, puts the persona manager in, registers the resolver."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from maskstore import InvalidMaskValue, InvalidName, MaskNotFound, Registry
from vllm_masquerade.reference import STORE, NotConfigured, Reference, find_store

TESTED = ("0.32.0",)
MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
MANAGER = "LRUCacheWorkerLoRAManager"  # replaced by a subclass
# What is replaced, wrapped, overridden or called of vLLM beyond its public interfaces, with the parameters relied on.
SYMBOLS: dict[str, tuple[str, ...]] = {
    f"{MIXIN}:{MANAGER}.__init__": ("self", "vllm_config", "device", "embedding_modules", "lora_model_cls"),
    "vllm.v1.worker.gpu_input_batch:InputBatch.make_lora_inputs": (
        "self",
        "num_scheduled_tokens",
        "num_sampled_tokens",
    ),
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "request",
        "start_token_idx",
        "end_token_idx",
        "start_mm_idx",
    ),
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys": ("request", "start_token_idx", "end_token_idx"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.model_manager:LoRAModelManager._create_lora_modules": ("self",),
    "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace": ("self", "lora_model"),
    "vllm.lora.model_manager:LoRAModelManager._get_punica_wrapper": ("self", "module_name"),
    "vllm.lora.model_manager:LoRAModelManager._set_adapter_mapping": ("self", "mapping"),
    "vllm.lora.model_manager:LoRAModelManager.create_dummy_lora": ("self", "lora_id", "rank", "embedding_modules"),
    "vllm.lora.lora_model:LoRAModel.__init__": ("self", "lora_model_id", "rank", "loras"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("self", "x", "output"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.create_lora_weights": ("self", "max_loras", "lora_config"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("self", "index"),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase._update_base_metadata": ("self", "mapping"),
    "vllm.model_executor.layers.quantization.utils.quant_utils:get_and_maybe_dequant_weights": ("layer", "out_dtype"),
}


class UnknownVllm(Exception):
    """This vLLM has another shape than those that the plugin was made for."""


def register() -> None:
    """Serve personas if `MASQUERADE_STORE` is set; vLLM stays as it is if not. May be called more than once.

    Raises `UnknownVllm`, and `NotConfigured` if the store is none.
    """
    if STORE not in os.environ:
        return
    root = find_store()
    check_vllm()
    from vllm_masquerade import phase
    from vllm_masquerade.manager import PersonaWorkerManager

    phase.install()
    setattr(importlib.import_module(MIXIN), MANAGER, PersonaWorkerManager)
    LoRAResolverRegistry.register_resolver("Masquerade", PersonaResolver(root))


def check_vllm() -> None:
    """Raise `UnknownVllm` if a symbol that the plugin needs is missing or has other parameters."""
    import vllm

    if os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0").lower() in ("1", "true"):
        raise NotConfigured("VLLM_LORA_ENABLE_DUAL_STREAM goes around the place where personas are subtracted")
    wrong = []
    for symbol, expected in SYMBOLS.items():
        module, _, path = symbol.partition(":")
        try:
            found = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
            parameters = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
        except (ImportError, AttributeError):
            wrong.append(f"{symbol} is missing")
            continue
        if parameters[: len(expected)] != expected:
            wrong.append(f"{symbol} takes {parameters}, not {expected}")
    if wrong:
        raise UnknownVllm(
            f"vLLM {vllm.__version__} is not one that vllm-masquerade knows (tested: {', '.join(TESTED)}): "
            f"{'; '.join(wrong)}. Install a tested version, or unset {STORE} to serve the base alone"
        )


class PersonaResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not checked
    """Finds the mask of a model's name that vLLM does not know."""

    def __init__(self, root: Path) -> None:
        self._registry = Registry(root)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:  # noqa: ARG002
        """The mask of `persona@digest:gamma:phase`; None, which is a 404, if there is none."""
        try:
            reference = await asyncio.to_thread(Reference.find, self._registry, lora_name)
        except (InvalidName, InvalidMaskValue, MaskNotFound):
            return None
        return LoRARequest(lora_name, 1, reference.path)  # vLLM numbers it
