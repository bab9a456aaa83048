"""What slots hold, and this project's own engine beside vLLM."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import World, start
from maskstore import MaskMismatch
from world import check, make_narrow, make_prompts, make_store

PYTHON = Path(os.environ.get("MASQUERADE_PYTHON", Path(__file__).parents[3] / ".venv" / "bin" / "python"))


def test_slots_hold_the_weights_of_the_checkpoint(world: World) -> None:
    """In bfloat16, too, where vLLM packs a weight on a CPU and drops it."""
    from vllm_masquerade.layers import served_weight

    llm = start(world, dtype="bfloat16", max_loras=1)
    assert llm.generate("a", use_tqdm=False)

    def compare(worker: object) -> bool:
        model = worker.get_model()  # type: ignore[attr-defined]
        base = dict(world.oracle.wear(None, 0.0).named_parameters())
        for layer in range(2):
            parts = [base[f"model.layers.{layer}.self_attn.{kind}_proj.weight"] for kind in "qkv"]
            linear = model.model.layers[layer].self_attn.qkv_proj.base_layer
            assert torch.equal(served_weight(linear, torch.bfloat16), torch.cat(parts).bfloat16())
        return True

    assert llm.collective_rpc(compare) == [True]


def test_the_store_decides_which_linears_have_slots(world: World, tmp_path: Path) -> None:
    narrow = replace(world, store=tmp_path, registry=make_store(tmp_path, [world.masks["kind"]]))
    llm = start(narrow, max_loras=1)
    narrow.verify(llm, [(make_prompts(1)[0], "kind")], 8)
    tight = make_narrow(world.model, "tight", "model.layers.0.self_attn.o_proj", (128, 128))
    narrow.registry.publish("tight", narrow.registry.store.add(tight))
    with pytest.raises(MaskMismatch, match="there is no slot, as no mask pruned it at the start; start vLLM again"):
        llm.llm_engine.add_lora(narrow.request("tight"))


@pytest.mark.skipif(not PYTHON.exists(), reason="no environment of Masquerade: MASQUERADE_PYTHON names its python")
def test_the_engine_of_masquerade_says_the_same(world: World) -> None:
    """Its tokens are those of the oracle, as vLLM's are in `test_tokens`."""
    names = [None, "calm", "loud", "kind", "late"]
    prompts = make_prompts(10, seed=40)
    requests = [(prompt, name) for prompt, name in zip(prompts, names * 2, strict=True)]
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("masquerade_engine.py"), world.model, world.store],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (prompt, name), tokens in zip(requests, json.loads(done.stdout), strict=True):
        phase = "decode" if name == "late" else "all"
        check(tokens, world.oracle.speak(prompt, 24, name, 0.0, phase))
