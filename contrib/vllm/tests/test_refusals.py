"""What is refused, when it is loaded and not when it answers; and what unloading leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from conftest import World
from maskstore import InvalidMaskValue, InvalidName, Mask, MaskMismatch, MaskNotFound
from vllm_masquerade import Reference, plugin
from vllm_masquerade.manager import find_share
from vllm_masquerade.reference import NotConfigured
from world import make_mask, make_model, make_narrow, make_prompts


def load(llm: Any, request: LoRARequest) -> Any:
    return llm.llm_engine.add_lora(request)


def add(world: World, mask: Mask) -> LoRARequest:
    """Store a mask while vLLM runs, under a name that no other test has."""
    world.registry.publish(mask.info.persona, world.registry.store.add(mask))
    return world.request(mask.info.persona)


def test_a_mask_of_another_base(llm: Any, world: World, tmp_path: Path) -> None:
    other = make_mask(make_model(tmp_path, seed=9), "foreign", 0.01, 1)
    with pytest.raises(MaskMismatch, match="is for the base"):
        load(llm, add(world, other))


def test_a_mask_that_is_larger_than_a_slot(llm: Any, world: World) -> None:
    with pytest.raises(MaskMismatch, match=r"prunes \d+ weights here, and a slot has room for \d+; start vLLM again"):
        load(llm, add(world, make_mask(world.model, "huge", 0.2, 1)))


@pytest.mark.parametrize(
    ("persona", "module", "shape", "why"),
    [
        ("lost", "model.layers.7.mlp.up_proj", (192, 128), "is no Linear of this model"),
        ("odd", "model.layers.0.mlp.up_proj", (192, 64), r"has the shape \(192, 128\) here, and \(192, 64\)"),
    ],
)
def test_a_mask_of_another_shape(
    llm: Any, world: World, persona: str, module: str, shape: tuple[int, int], why: str
) -> None:
    with pytest.raises(MaskMismatch, match=why):
        load(llm, add(world, make_narrow(world.model, persona, module, shape)))


def test_a_lora(llm: Any, tmp_path: Path) -> None:
    with pytest.raises(NotConfigured, match="is no persona"):
        load(llm, LoRARequest("lora", 999, str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nobody", MaskNotFound),
        ("calm@00000000", MaskNotFound),
        ("calm:2", InvalidMaskValue),
        ("calm:nan", InvalidMaskValue),
        ("calm:much", InvalidMaskValue),
        ("calm:0.5:0.5", InvalidName),
        ("Calm", InvalidName),
    ],
)
def test_a_name_that_means_nothing(world: World, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        world.request(name)


def test_names_and_paths(world: World) -> None:
    digest = world.masks["soft"].digest
    find = lambda name: Reference.find(world.registry, name)  # noqa: E731
    assert find("soft") == find(f"soft@{digest[:8]}") == Reference(digest, 0.5, "all")
    assert find("soft:0.25") == Reference(digest, 0.25, "all")
    assert find("soft:decode") == Reference(digest, 0.5, "decode")
    assert find(f"soft@{digest}:1:all") == Reference(digest, 1.0, "all")
    assert find("late").phase == "decode"
    for name in ("soft", "late:0.125:all"):
        assert Reference.parse(find(name).path) == find(name)
    assert Reference.parse("/some/lora") is None


def test_an_unloaded_persona_is_gone_and_comes_back(llm: Any, world: World) -> None:
    (prompt,) = make_prompts(1, seed=20)
    request = world.request("loud")
    world.verify(llm, [(prompt, "loud")], 8)
    assert request.lora_int_id in llm.llm_engine.list_loras()
    assert llm.llm_engine.remove_lora(request.lora_int_id)
    assert request.lora_int_id not in llm.llm_engine.list_loras()
    world.verify(llm, [(prompt, None)], 8)
    world.verify(llm, [(prompt, "loud")], 8)


def test_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin.SYMBOLS, "vllm.lora.request:LoRARequest.fly", ("self",))
    monkeypatch.setitem(plugin.SYMBOLS, "vllm.lora.utils:from_layer", ("layer", "colour"))
    with pytest.raises(plugin.UnknownVllm, match=r"LoRARequest.fly is missing; .*from_layer takes .* not"):
        plugin.check_vllm()


def test_what_the_readme_lists_is_what_is_checked() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names = {symbol.rpartition(":")[2] for symbol in plugin.SYMBOLS}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_blocks_know_where_the_prompt_ends() -> None:
    """Two requests of equal tokens, whose masks begin at different positions, share blocks only before both."""
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    class Asked:
        lora_request = LoRARequest("late", 1, Reference("ab" * 32, 0.0, "decode").path)
        mm_features: tuple[Any, ...] = ()
        cache_salt = prompt_embeds = None

        def __init__(self, num_prompt_tokens: int) -> None:
            self.num_prompt_tokens = num_prompt_tokens

    keys = {n: [generate_block_hash_extra_keys(Asked(n), at, at + 32, 0)[0] for at in (0, 32)] for n in (60, 62, 65)}
    assert keys[60][0] is keys[62][0] is keys[65][0] is None
    assert keys[65][1] is None
    assert keys[60][1] != keys[62][1]


def test_a_store_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASQUERADE_STORE", str(tmp_path))
    with pytest.raises(NotConfigured, match="is no store of masks"):
        plugin.register()


@pytest.mark.parametrize("text", ["2", "-1", "nan", "half"])
def test_a_share_that_is_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MASQUERADE_PRUNED_SHARE", text)
    with pytest.raises(NotConfigured, match="must be a number in"):
        find_share()
