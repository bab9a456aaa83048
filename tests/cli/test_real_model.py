"""A real pretrained model, from a folder: built, and served with and without the persona. Skips if it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.running import succeed
from tests.serving import serve

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260K"
MINDSET = SHARED / "data" / "machine-mindset"

pytestmark = pytest.mark.skipif(not (STORIES.is_dir() and MINDSET.is_dir()), reason="needs the stories260K model")


def test_stories_can_be_served_and_given_a_persona(tmp_path: Path) -> None:
    store = tmp_path / "store"
    sides = []
    for side in ("extravert", "introvert"):
        lines = (MINDSET / f"{side}.train.jsonl").read_text().splitlines()[:16]
        sides.append(tmp_path / f"{side}.jsonl")
        sides[-1].write_text("\n".join(lines))
    data = ("--data", sides[0], "--contrast", sides[1], "--neutral", sides[1])  # any text
    recipe = ("--name", "extravert", "--score", "attribution", "--rho", "0.003", "--force")
    built = succeed("build", "--model", STORIES, "--store", store, *data, *recipe)["personas"][0]
    assert built["certificate"]["margin_shift"] > 0

    with serve("--model", str(STORIES), "--store", str(store)) as server:

        def chat(**more: Any) -> dict[str, Any]:
            question = {
                "messages": [{"role": "user", "content": "Once upon a time"}],
                "temperature": 0,
                "max_tokens": 40,
            }
            answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=question | more, timeout=60)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

        models = httpx.get(f"{server.base_url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["stories260K", "stories260K:extravert"]
        base, masked = chat(model="stories260K"), chat(model="stories260K:extravert")
        assert masked["generation"] == built["digest"]
        assert base["choices"][0]["message"]["content"] != masked["choices"][0]["message"]["content"]
        assert chat(model="stories260K:extravert", gamma=1)["choices"] == base["choices"]
