"""The world of the tests, made once, and vLLM's environment on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from maskstore import Mask, Registry
from world import Oracle, check, make_mask, make_model, make_store

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
WAYS: dict[str | None, tuple[Any, ...]] = {  # name -> what the oracle is told
    None: (),
    "base": (),
    "calm": ("calm",),
    "loud": ("loud",),
    "kind": ("kind",),
    "soft": ("soft", 0.5),
    "soft:0": ("soft",),
    "late": ("late", 0.0, "decode"),
    "late:all": ("late",),
    "calm:0.25:decode": ("calm", 0.25, "decode"),
}


@dataclass(frozen=True)
class World:
    """A model, the masks of a store, and what a persona says."""

    model: Path
    store: Path
    registry: Registry
    masks: dict[str, Mask]
    oracle: Oracle

    def request(self, name: str) -> Any:
        """The request of a persona."""
        os.environ["MASQUERADE_STORE"] = str(self.store)
        from vllm_masquerade import make_request

        return make_request(name)

    def generate(self, llm: Any, requests: list[tuple[list[int], str | None]], count: int) -> list[list[int]]:
        """So many greedy tokens of (prompt, name or None for the base), in one batch."""
        from vllm import SamplingParams

        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True),
            lora_request=[name and self.request(name) for _, name in requests],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def verify(self, llm: Any, requests: Iterable[tuple[list[int], str | None]], count: int = 24) -> None:
        """Check the tokens of requests."""
        requests = list(requests)
        for (prompt, name), tokens in zip(requests, self.generate(llm, requests, count), strict=True):
            check(tokens, self.oracle.speak(prompt, count, *WAYS[name]))


def make_world(folder: Path, **model: Any) -> World:
    """Five personas of a model. `kind` prunes two kinds of Linears only, `soft` has a gamma, and `late` a phase."""
    base = make_model(folder / "model", **model)
    masks = {
        "calm": make_mask(base, "calm", 0.02, 1),
        "loud": make_mask(base, "loud", 0.01, 2),
        "kind": make_mask(base, "kind", 0.02, 3, kinds=("v_proj", "up_proj")),
        "soft": make_mask(base, "soft", 0.03, 4, gamma=0.5),
        "late": make_mask(base, "late", 0.02, 5, phase="decode"),
    }
    return World(base, folder / "store", make_store(folder / "store", masks.values()), masks, Oracle(base, masks))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world of a Llama."""
    return make_world(tmp_path_factory.mktemp("world"))


def start(world: World, **changes: Any) -> Any:
    """vLLM in this process. When it goes, so does what all of them share, so a test with one of its own comes before
    the first or after the last that takes `llm`.
    """
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
def llm(world: World) -> Any:
    """vLLM with room for four personas in a batch."""
    return start(world)
