"""What docs/clients.md shows is run; what Open WebUI asks is asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.keys.making import bearer, make_key
from tests.serving import Server, serve

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
QUESTION = {"role": "user", "content": "Would you like to come to a party?"}


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", examples("python"), ids=lambda code: re.search(r"(?:from|import) (\w+)", code)[1])
def test_python_examples_run(server: Server, code: str) -> None:
    """Where what they import is installed. LangChain and LiteLLM are not: they pin other versions of what we use."""
    for module in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    script = code.replace("http://127.0.0.1:8000", server.base_url)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize("script", examples("bash"), ids=["masq", "curl"])
def test_shell_examples_run(server: Server, script: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8000", server.base_url)],
        env={**os.environ, "PATH": path, "MASQUERADE_URL": server.base_url, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '"code"' not in done.stdout
    assert "formal" in done.stdout


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Open WebUI's connection: a base URL that ends in /v1, and a key for chat that opens two personas."""
    store = tmp_path_factory.mktemp("store")
    key, _ = make_key(store, "chat", personas=("introvert", "extravert"))
    with (
        serve("--model", "demo", "--store", str(store)) as server,
        httpx.Client(base_url=f"{server.base_url}/v1", headers=bearer(key), timeout=120) as client,
    ):
        yield client


def test_open_webui_finds_the_personas_of_its_key(webui: httpx.Client) -> None:
    models = webui.get("/models").raise_for_status().json()
    assert {model["id"] for model in models["data"]} == {"demo", "demo:introvert", "demo:extravert"}
    assert {"object", "created", "owned_by"} <= models["data"][0].keys()


def test_open_webui_streams_a_chat(webui: httpx.Client) -> None:
    """With usage, which it always asks for, and with fields that are nobody's but its own."""
    asked = {
        "model": "demo:introvert",
        "messages": [{"role": "system", "content": "Be kind."}, QUESTION],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "reasoning": {"effort": "low"},
        "metadata": {"chat_id": "c1", "session_id": "s1"},
        "user": "somebody",
        "logit_bias": {"5": -100},
    }
    with webui.stream("POST", "/chat/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks: list[dict[str, Any]] = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert chunks[-1]["usage"]["total_tokens"] > 0
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("task", ["Generate a concise, 3-5 word title as JSON.", "Generate 1-3 broad tags as JSON."])
def test_open_webui_asks_for_titles_and_tags(webui: httpx.Client, task: str) -> None:
    asked = {
        "model": "demo:introvert",
        "messages": [{"role": "user", "content": task}],
        "stream": False,
        "max_completion_tokens": 20,
        "metadata": {"task": "title_generation", "chat_id": "c1"},
    }
    answer = webui.post("/chat/completions", json=asked).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"]


def test_open_webui_shows_the_errors_as_they_are(webui: httpx.Client) -> None:
    asked = {"model": "demo:gloomy", "messages": [QUESTION], "stream": True}
    refused = webui.post("/chat/completions", json=asked)
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/json")
    assert refused.json()["error"]["code"] == "persona_forbidden"
    assert webui.get("/models", headers=bearer("mq-wrong")).status_code == 401


def test_every_picture_is_there() -> None:
    folder = Path(__file__).parents[2] / "docs"
    shown = set(re.findall(r'(?:src|srcset)="([^"]+)"', PAGE))
    assert shown == {f"images/{picture.name}" for picture in (folder / "images").glob("*.png")}
