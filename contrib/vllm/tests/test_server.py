"""vLLM's server with the plugin found by its entry point: personas are models of OpenAI's API."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from conftest import WAYS, World, make_world
from serving import NEW, SECONDS, ask, connect, run, serve, verify
from world import check, make_mask, make_model, make_prompts, make_store

NAMES = ["base", "calm", "loud", "soft", "late"]


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose store has a persona of another base, too."""
    folder = tmp_path_factory.mktemp("server")
    foreign = make_mask(make_model(folder / "other", seed=9), "foreign", 0.01, 1)
    make_store(folder / "store", [*world.masks.values(), foreign])
    with serve(world, folder / "store", folder / "log") as address:
        yield address


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return connect(server)


def test_every_persona_at_once(client: openai.OpenAI, world: World) -> None:
    verify(world, client, [(prompt, name) for prompt in make_prompts(3, seed=30) for name in NAMES])


def test_a_stream(client: openai.OpenAI, world: World) -> None:
    (prompt,) = make_prompts(1, seed=31)
    for name in ("late", "base"):
        chunks = [*ask(client, name, prompt, stream=True)]
        assert len(chunks) > NEW // 2
        tokens = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]
        check(tokens, world.oracle.speak(prompt, NEW, *WAYS[name]))


def test_a_chat(client: openai.OpenAI) -> None:
    said = {}
    for name in ("base", "calm"):
        answer = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "Who are you, and what are you doing here?"}],
            max_tokens=NEW,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        said[answer.model] = answer.choices[0].message.content
    assert said["base"] != said["calm"]


def test_a_digest_names_a_mask(client: openai.OpenAI, world: World) -> None:
    (prompt,) = make_prompts(1, seed=32)
    name = f"calm@{world.masks['calm'].digest[:12]}"
    check(ask(client, name, prompt).choices[0].token_ids, world.oracle.speak(prompt, NEW, "calm"))
    assert {"base", name} <= {model.id for model in client.models.list()}


def test_an_unknown_persona_is_no_base(client: openai.OpenAI) -> None:
    for name in ("nobody", "calm@00000000", "calm:7", "calm:quick"):
        with pytest.raises(openai.NotFoundError):
            ask(client, name, [5, 6, 7])


def test_a_mask_of_another_base_is_no_base(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="could not be loaded"):
        ask(client, "foreign", [5, 6, 7])
    assert ask(client, "base", [5, 6, 7]).choices[0].token_ids


def test_unload(client: openai.OpenAI, server: str, world: World) -> None:
    (prompt,) = make_prompts(1, seed=33)
    verify(world, client, [(prompt, "loud")])
    assert post(server, "unload_lora_adapter", {"lora_name": "loud"}) == 200
    assert "loud" not in {model.id for model in client.models.list()}
    assert post(server, "unload_lora_adapter", {"lora_name": "loud"}) == 404
    verify(world, client, [(prompt, "loud"), (prompt, "base")])


def post(server: str, route: str, body: dict[str, str]) -> int:
    request = urllib.request.Request(
        f"{server}/v1/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        return int(urllib.request.urlopen(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_store_without_masks_of_the_base_needs_a_share(world: World, tmp_path: Path) -> None:
    make_store(tmp_path / "store", [])
    with run(world, tmp_path / "store", tmp_path / "log") as (process, _):
        assert process.wait(SECONDS) != 0
    assert "MASQUERADE_PRUNED_SHARE must say how much" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("heads", [2, 1], ids=["a key head on each rank", "one key head on both ranks"])
def test_two_tensor_parallel_ranks(tmp_path: Path, heads: int) -> None:
    """The store is empty at the start, so slots have the size that the share says."""
    world = make_world(tmp_path, num_key_value_heads=heads)
    make_store(tmp_path / "later", [])
    options = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")
    with serve(world, tmp_path / "later", tmp_path / "log", *options, MASQUERADE_PRUNED_SHARE="0.05") as address:
        make_store(tmp_path / "later", world.masks.values())
        verify(world, connect(address), [(prompt, name) for prompt in make_prompts(2, seed=34) for name in NAMES])
