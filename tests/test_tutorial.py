"""Runs docs/tutorial.md from top to bottom against a server of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serving import Server, serve

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = [*re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL), ("", "")]
STEPS = [(code, of, after[1] if after[0] == "text" else None) for (of, code), after in pairwise(BLOCKS)]
RUNNERS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


@pytest.fixture(scope="module")
def fresh() -> Iterator[Server]:
    """The demo with an empty store: the tutorial changes what it holds."""
    with serve("--model", "demo") as running:
        yield running


def test_the_tutorial_prints_what_it_shows(fresh: Server) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "MASQUERADE_URL": fresh.base_url, "NO_COLOR": "1"}
    steps = [step for step in STEPS if step[1] in RUNNERS]
    assert len(steps) > 8
    assert {of for _, of, output in steps if output} == {"bash", "python"}
    for code, of, output in steps:
        script = code.replace("http://127.0.0.1:8000", fresh.base_url)
        done = subprocess.run(
            [*RUNNERS[of], script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        if output is not None:
            assert done.stdout == output, code
        elif "masq personas" in code:
            for row in re.findall(r"^│ ([^│]*\w)", TEXT, re.MULTILINE):
                assert row in done.stdout
