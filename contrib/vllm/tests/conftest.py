"""The world of the tests, made once, and vLLM's environment on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from world import Oracle, make_mask, make_model, make_store

from maskstore import Mask, Registry

SETTINGS = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
os.environ.update(SETTINGS)


@dataclass(frozen=True)
class World:
    """A model, the masks of a store, and what a persona says."""

    model: Path
    store: Path
    registry: Registry
    masks: dict[str, Mask]
    oracle: Oracle


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Five personas of a tiny Llama. `kind` prunes two kinds of Linears, `soft` has a gamma, and `late` a phase."""
    folder = tmp_path_factory.mktemp("world")
    model = make_model(folder / "model")
    some = ["self_attn.v_proj", "mlp.up_proj"]
    masks = {
        "calm": make_mask(model, "calm", 0.02, 1),
        "loud": make_mask(model, "loud", 0.01, 2),
        "kind": make_mask(model, "kind", 0.02, 3, kinds=some),
        "soft": make_mask(model, "soft", 0.03, 4, gamma=0.5),
        "late": make_mask(model, "late", 0.02, 5, phase="decode"),
    }
    registry = make_store(folder / "store", masks.values())
    return World(model, folder / "store", registry, masks, Oracle(model, masks))


def start(world: World, **changes: Any) -> Any:
    """vLLM in this process."""
    os.environ["MASQUERADE_STORE"] = str(world.store)
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_lora": True,
        "max_loras": 4,
        "max_cpu_loras": 8,
        "max_num_seqs": 16,
        "max_model_len": 256,
        "block_size": 32,
    }
    return LLM(str(world.model), **(settings | changes))


@pytest.fixture(scope="session")
def llm(world: World) -> Iterator[Any]:
    """vLLM with room for four personas in a batch."""
    yield start(world)


def generate(llm: Any, requests: list[tuple[list[int], str | None]], count: int) -> list[list[int]]:
    """So many greedy tokens of (prompt, persona or None), in one batch."""
    from vllm import SamplingParams

    from vllm_masquerade import make_request

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True),
        lora_request=[name and make_request(name) for _, name in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
