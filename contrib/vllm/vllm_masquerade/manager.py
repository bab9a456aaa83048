"""vLLM's LoRA managers, which load masks of a store instead of LoRAs and keep the least recently used slots."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import PPMissingLayer

from maskstore import Mask, MaskError, MaskMismatch, Registry, fingerprint
from maskstore.layout import Module
from vllm_masquerade.layers import NoRoom, make_layer
from vllm_masquerade.reference import STORE, NotConfigured, Reference, find_store

SHARE = "MASQUERADE_PRUNED_SHARE"
_RESTART = f"; start vLLM again, with the mask in the store or a larger {SHARE}"
logger = init_logger(f"vllm.{__name__}")


class PersonaModelManager(LRUCacheLoRAModelManager):  # type: ignore[misc]  # vLLM is not checked
    """Wraps the Linears that masks may prune, and fills their slots."""

    def __init__(self, *args: Any, vllm_config: Any, **keywords: Any) -> None:
        if vllm_config.lora_config.fully_sharded_loras:
            raise NotConfigured("personas have no ranks to shard: leave out --fully-sharded-loras")
        self.store = Registry(find_store()).store
        self.base = fingerprint(find_folder(vllm_config.model_config))
        self._has_runner_v2 = vllm_config.use_v2_model_runner
        self._empty: set[str] = set()  # Linears that have no slots
        super().__init__(*args, vllm_config=vllm_config, **keywords)

    def _create_lora_modules(self) -> None:
        """Only Linears are wrapped: masks prune neither embeddings nor heads nor experts."""
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper._token_lora_indices.fill_(-1)
        share, held = find_share(), list(self._outline_masks())
        if not share and not held:
            raise NotConfigured(
                f"no sparse mask in the store {os.environ[STORE]} is of this base ({self.base[:16]}), so {SHARE} must "
                "say how much of a Linear's weights masks may prune, such as 0.005"
            )
        for name, linear in [*self.model.named_modules()]:
            if not isinstance(linear, LinearBase) or (punica := self._get_punica_wrapper(name)) is None:
                continue
            kind = name.rpartition(".")[2]
            packed = self.packed_modules_mapping.get(kind, [])
            if (layer := make_layer(linear, packed, self.lora_config, self.model.config)) is None:
                continue
            sources = self._sources(name)
            most = max((sum(pruned.get(source, 0) for source in sources) for pruned in held), default=0)
            layer.room = max(most, math.ceil(share * sum(layer.parts()) * linear.input_size))
            if not layer.room:
                self._empty.update(sources)
                continue
            layer.create_lora_weights(self.lora_slots, self.lora_config, self.model.config)
            replace_submodule(self.model, name, layer)
            self.register_module(name, layer)
            layer.set_mapping(punica)
        size = sum(
            tensor.nbytes for layer in self.modules.values() for tensor in (layer.bounds, layer.columns, layer.values)
        )
        logger.info("%d Linears have %d slots for personas, %d bytes", len(self.modules), self.lora_slots, size)

    def _sources(self, name: str) -> list[str]:
        """The Linears of the checkpoint, by vLLM's names, that a Linear of vLLM consists of."""
        parent, dot, kind = name.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(kind) or [kind]]

    def _outline_masks(self) -> Iterator[dict[str, int]]:
        """Module -> pruned weights, of each mask of this base in the store that is sparse throughout."""
        for digest in self.store.digests():
            try:
                with self.store.reader(digest) as reader:
                    base, modules = reader.base, reader.header.modules
            except MaskError as error:
                logger.warning("a mask of the store is left out: %s", error)
                continue
            counts = {self._rename(name): _count(module) for name, module in modules.items()}
            if base.fingerprint == self.base and None not in counts.values():
                yield {name: count for name, count in counts.items() if count is not None}

    def _rename(self, name: str) -> str:
        """A module's name in the checkpoint -> its name in vLLM, before Linears are fused."""
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        renamed = mapper.get_rename_mapper()._map_name(name) if mapper else name
        return name if renamed is None else str(renamed)

    def load_mask(self, number: int, reference: Reference) -> LoRAModel:
        """A mask at a gamma as an adapter. Raises the errors of maskstore, `MaskMismatch` if it does not fit."""
        mask = self.store.open(reference.digest, base=self.base)
        if reference.phase == "decode" and self._has_runner_v2:
            raise self._refuse(
                mask,
                None,
                "phase `decode` needs vLLM's model runner V1 (VLLM_USE_V2_MODEL_RUNNER=0); with `:all` after its name "
                "the mask applies to prompts as well",
            )
        targets = {self._rename(name): target for name, target in mask.targets.items() if target.pruned}
        pruned = {}
        for name, layer in self.modules.items():
            sources = self._sources(name)
            if any(source in targets for source in sources):
                try:
                    pruned[name] = layer.gather([targets.pop(each, None) for each in sources], 1 - reference.gamma)
                except NoRoom as error:
                    raise self._refuse(mask, name, f"{error.message}{_RESTART}") from None
                except MaskMismatch as error:
                    raise self._refuse(mask, name, error.message) from None
        self._check_elsewhere(mask, targets)
        return LoRAModel(number, 1, pruned)

    def _check_elsewhere(self, mask: Mask, targets: Iterable[str]) -> None:
        """Refuse targets that no Linear here has, except for those of other stages of a pipeline."""
        away = [f"{name}." for name, module in self.model.named_modules() if isinstance(module, PPMissingLayer)]
        for name in targets:
            if name in self._empty:
                raise self._refuse(mask, name, f"there is no slot, as no mask pruned it at the start{_RESTART}")
            if not name.startswith(tuple(away)):
                raise self._refuse(mask, name, "it is no Linear of this model that vLLM can adapt")

    def _refuse(self, mask: Mask, name: str | None, why: str) -> MaskMismatch:
        return MaskMismatch(f"{mask.info.persona}@{mask.digest[:8]} cannot be served: {why}", tensor=name)

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """`load_mask` has fused what vLLM fuses."""

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> LoRAModel:  # noqa: ARG002
        """An adapter without effect, for profiling and for the capture of graphs."""
        return LoRAModel(lora_id, rank, {})

    def _set_adapter_mapping(self, mapping: Any) -> None:
        # A prefill has metadata of LoRA's products, with room for one run of tokens a request; prompts have two here.
        super()._set_adapter_mapping(replace(mapping, is_prefill=False))
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper._token_lora_indices[wrapper.indices_len[0] or 0 :].fill_(-1)  # rows that pad a graph


class PersonaWorkerManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]  # vLLM is not checked
    """Loads the mask that a request names."""

    _manager_cls = PersonaModelManager

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        reference = Reference.parse(lora_request.lora_path)
        if reference is None:
            raise NotConfigured(
                f"{lora_request.lora_name!r} ({lora_request.lora_path!r:.120}) is no persona; this vLLM serves "
                f"personas, as {STORE} is set, and LoRAs need one of their own"
            )
        return self._adapter_manager.load_mask(lora_request.lora_int_id, reference)


def find_folder(model_config: Any) -> Path:
    """The folder of the served checkpoint, which vLLM has loaded from the disk or from the hub's cache."""
    if (folder := Path(model_config.model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))


def find_share() -> float:
    """The share of a Linear's weights that a slot holds in any case."""
    text = os.environ.get(SHARE, "0")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise NotConfigured(f"{SHARE} is {text!r:.40}; it must be a number in [0, 1]")
    return share


def _count(module: Module) -> int | None:
    """The pruned weights of a module in a header; None for a bitmap, which does not say."""
    return module.tensors["cols"].shape[0] if "cols" in module.tensors else module.pruned
