"""Two servers on one bucket: what is published or deleted on one counts on the other within two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from maskstore import Mask, write_mask
from masquerade.model import Base
from tests import s3
from tests.cli.running import fail, masquerade
from tests.serving import Server, serve
from tests.world import make_mask

SEEN_SECONDS = 2.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with s3.serving() as service:
        yield service.make_bucket("personas") + "/tiny"


@pytest.fixture(scope="module")
def servers(url: str, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    homes = [tmp_path_factory.mktemp(name) for name in ("a", "b")]
    arguments = ("--model", str(tiny_folder), "--store", url)
    with (
        serve(*arguments, env={"XDG_DATA_HOME": str(homes[0])}) as first,
        serve(*arguments, env={"XDG_DATA_HOME": str(homes[1])}) as second,
    ):
        yield [first, second]


@pytest.fixture
def mask(tiny: Base) -> Mask:
    return make_mask(tiny, 0.3, 1)


def ask(server: Server, persona: str) -> httpx.Response:
    body = {"model": models(server)[0], "persona": persona, "max_tokens": 4, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "a b c"}]
    return httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)


def models(server: Server) -> list[str]:
    return [one["id"] for one in httpx.get(f"{server.base_url}/v1/models", timeout=60).json()["data"]]


def wait_for_status(server: Server, persona: str, status: int) -> float:
    started = time.monotonic()
    while (found := ask(server, persona)).status_code != status:
        assert time.monotonic() < started + 30, found.text
        time.sleep(0.05)
    return time.monotonic() - started


def test_a_persona_is_everywhere_and_then_nowhere(servers: list[Server], mask: Mask, tmp_path: Path) -> None:
    here, there = servers
    assert ask(there, "shy").status_code == 404
    path = tmp_path / "shy.safetensors"
    write_mask(mask, path)
    published = httpx.put(f"{here.base_url}/v1/personas/shy/content", content=path.read_bytes(), timeout=60)
    assert published.status_code == 201, published.text
    assert wait_for_status(there, "shy", 200) < SEEN_SECONDS
    answers = [ask(server, "shy").json() for server in servers]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert {answer["generation"] for answer in answers} == {mask.digest}
    assert models(here) == models(there)
    assert httpx.delete(f"{there.base_url}/v1/personas/shy", timeout=60).status_code in (200, 204)
    assert wait_for_status(here, "shy", 404) < SEEN_SECONDS


def test_the_start_says_where_personas_are(servers: list[Server], url: str) -> None:
    for server in servers:
        assert f"personas are in {url}" in server.said()
        assert "secret-of-the-bucket" not in server.said()


def test_commands_take_a_bucket(
    servers: list[Server], url: str, mask: Mask, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "c"))
    path = tmp_path / "bold.safetensors"
    write_mask(mask, path)
    where = ("--model", tiny_folder, "--store", url)
    assert masquerade("masks", "import", path, "--name", "bold", *where).status == 0
    assert wait_for_status(servers[0], "bold", 200) < SEEN_SECONDS
    assert "bold" in masquerade("masks", "ls", *where).stdout
    assert "no-such-bucket" in fail(1, "masks", "ls", "--model", tiny_folder, "--store", "s3://no-such-bucket/x")


def test_a_url_without_a_bucket_is_refused(tiny_folder: Path) -> None:
    assert "name the bucket" in fail(2, "masks", "ls", "--model", tiny_folder, "--store", "s3://")
