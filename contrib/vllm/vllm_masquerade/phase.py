"""Phase `decode` in vLLM: the base reads the prompt, and the mask applies from the last prompt token on.

vLLM maps all tokens of a request to its adapter, and takes every KV cache block of it for the adapter's. Both are
corrected here, for requests whose adapter is a mask in phase `decode`; nothing changes for others.
"""

from __future__ import annotations

from functools import lru_cache, wraps
from typing import Any

import numpy as np
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_masquerade.reference import Reference

_MARK = "_masquerade"


def install() -> None:
    """Wrap vLLM's two functions, once."""
    if not hasattr(InputBatch.make_lora_inputs, _MARK):
        InputBatch.make_lora_inputs = _mark(_map_prompts(InputBatch.make_lora_inputs))
        keys = _mark(_key_blocks(kv_cache_utils.generate_block_hash_extra_keys))
        kv_cache_utils.generate_block_hash_extra_keys = keys
        block_pool.generate_block_hash_extra_keys = keys  # imported by name, for events


def _map_prompts(make_lora_inputs: Any) -> Any:
    """Token -> adapter, with 0 (the base) for the positions of a prompt before its last."""

    @wraps(make_lora_inputs)
    def mapped(self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        sampled, tokens, requests = make_lora_inputs(self, num_scheduled_tokens, num_sampled_tokens)
        if late := [request.lora_int_id for request in requests if is_late(request.lora_path)]:
            count = self.num_reqs
            before = self.num_prompt_tokens[:count] - 1 - self.num_computed_tokens_cpu[:count]
            before = np.where(np.isin(self.request_lora_mapping[:count], late), before, 0)
            rows = np.array(tokens)
            for end, scheduled, base in zip(
                np.cumsum(num_scheduled_tokens), num_scheduled_tokens, before.clip(0, num_scheduled_tokens), strict=True
            ):
                rows[end - scheduled : end - scheduled + base] = 0
            tokens = tuple(rows.tolist())
        return sampled, tokens, requests

    return mapped


def _key_blocks(generate_block_hash_extra_keys: Any) -> Any:
    """Blocks before the last prompt token are the base's, and shared; later ones know where the prompt ends."""

    @wraps(generate_block_hash_extra_keys)
    def keyed(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = generate_block_hash_extra_keys(request, start_token_idx, end_token_idx, start_mm_idx)
        if request.lora_request and is_late(request.lora_request.lora_path):
            keys = tuple(keys or ())
            if end_token_idx < request.num_prompt_tokens:
                keys = tuple(key for key in keys if key[0] != "lora")
            else:
                keys = (*keys, ("masquerade", str(request.num_prompt_tokens)))
        return keys or None, next_mm_idx

    return keyed


@lru_cache(4096)
def is_late(path: str) -> bool:
    """Whether an adapter's path is that of a mask in phase `decode`."""
    reference = Reference.parse(path)
    return reference is not None and reference.phase == "decode"


def _mark(function: Any) -> Any:
    setattr(function, _MARK, True)
    return function
