"""Everything at once on one store: builds, chats, changes of the registry, and a second server that looks on."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from maskstore import fsck
from tests.building.asking import QUICK, ask, build, connect, finish
from tests.serving import Server, serve

MODELS = ("demo", "demo:formal", "demo:gloomy", "demo:extravert")
SECONDS = float(os.environ.get("MASQUERADE_STRESS_SECONDS", "4"))  # 120 for a thorough run
CHANGES = 17  # of the registry, at least, by each of three


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together") / "store"


@pytest.fixture(scope="module")
def builder(store: Path) -> Iterator[Server]:
    with serve("--model", "demo", "--store", str(store)) as server:
        yield server


@pytest.fixture(scope="module")
def onlooker(store: Path, builder: Server) -> Iterator[Server]:
    """A second server on the same store."""
    with serve("--model", "demo", "--store", str(store)) as server:
        yield server


@pytest.mark.timeout(300 + 2 * SECONDS)
def test_builds_chats_and_changes_at_once_disturb_nobody(builder: Server, store: Path) -> None:
    questions = ["How do I get to the bakery?", "How was the exam?", "Who are you?", "What is the capital of Peru?"]
    asked = [(model, question) for model in MODELS for question in questions]
    deadline = time.monotonic() + SECONDS
    with (
        httpx.Client(base_url=builder.base_url, timeout=60) as http,
        connect(builder) as sdk,
        ThreadPoolExecutor(16) as pool,
    ):
        before = dict(zip(asked, pool.map(lambda one: ask(sdk, *one), asked), strict=True))
        jobs = [build(sdk, name, **QUICK).id for name in ("first", "second")]

        def chat(seed: int) -> int:
            rng, count = random.Random(seed), 0
            while not count or time.monotonic() < deadline:
                one = rng.choice(asked)
                assert ask(sdk, *one) == before[one], one
                count += 1
            return count

        def change(seed: int) -> int:
            rng, count = random.Random(seed), 0
            while count < CHANGES or time.monotonic() < deadline:
                name = f"mix-{seed}"
                pair = rng.sample(["formal", "casual", "gloomy", "cheerful"], 2)
                for answer in (
                    http.post("/v1/personas/compose", json={"name": name, "expression": " | ".join(pair)}),
                    http.patch(f"/v1/personas/{name}", json={"gamma": rng.random(), "tags": ["npc"]}),
                    http.put(f"/v1/aliases/other-{seed}", json={"persona": name}),
                    http.get("/v1/personas"),
                ):
                    assert answer.status_code in (200, 201), answer.text
                    count += 1
            return count

        chats = [pool.submit(chat, seed) for seed in range(10)]
        changes = [pool.submit(change, seed) for seed in range(3)]
        assert all(one.result() for one in [*chats, *changes])
        assert [finish(sdk, job, 300 + SECONDS).status for job in jobs] == ["succeeded"] * 2
    assert fsck(store).clean


def test_a_second_server_on_the_store_sees_at_once_and_does_not_build(builder: Server, onlooker: Server) -> None:
    with (
        httpx.Client(base_url=builder.base_url) as here,
        httpx.Client(base_url=onlooker.base_url) as there,
        connect(builder) as sdk,
        connect(onlooker) as other,
    ):
        made = here.post("/v1/personas/compose", json={"name": "shared", "expression": "formal | introvert"})
        assert made.status_code == 201
        assert "demo:shared" in [model["id"] for model in there.get("/v1/models").json()["data"]]
        assert ask(other, "demo:shared") == ask(sdk, "demo:shared")
        refused = there.get("/v1/files")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert refused.headers["x-should-retry"] == "false"


def test_an_upload_beyond_the_limit_is_refused_while_it_arrives(builder: Server, store: Path) -> None:
    """It says that it is 2 GB; the server must not wait for all of it, and keep nothing."""
    sent = 0

    def content() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        while sent < 2**31:
            sent += 2**20
            yield bytes(2**20)

    before = set((store / "jobs" / "files").iterdir())
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        refused = httpx.post(f"{builder.base_url}/v1/files", content=content(), headers=headers, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    except httpx.WriteError:  # the server hung up on the rest of it
        pass
    assert sent < 2**29
    assert set((store / "jobs" / "files").iterdir()) == before


@pytest.mark.parametrize(
    "line", [b'{"text": ' + b"[" * 100_000, b'{"text": "' + b"x" * 3_000_000 + b'"', b'{"text": 1e999}', b"\x00\xff"]
)
def test_a_file_that_is_a_bomb_is_refused_with_its_line(builder: Server, line: bytes) -> None:
    with httpx.Client(base_url=builder.base_url, timeout=60) as http:
        form: dict[str, Any] = {"files": {"file": ("bomb.jsonl", line)}, "data": {"purpose": "fine-tune"}}
        file = http.post("/v1/files", **form).json()["id"]
        method = {"type": "mask", "mask": {"score": "wanda"}}
        body = {"model": "demo", "training_file": file, "suffix": "bomb", "method": method}
        refused = http.post("/v1/fine_tuning/jobs", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_dataset"), refused.text
        assert file in refused.json()["error"]["message"]
