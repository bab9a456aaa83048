"""What the README shows is what happens: its commands are run, and their output is compared with the text below."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serving import Server

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
JQ = "jq -r '.choices[0].message.content'"  # not on every machine
PYTHON = 'python3 -c \'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])\''


def examples(language: str) -> list[tuple[str, str]]:
    """Blocks of a language that are followed by a block of text, with that text."""
    blocks = FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    return [(code, output) for (of, code), (after, output) in pairwise(blocks) if (of, after) == (language, "text")]


def test_the_readme_has_examples() -> None:
    assert len(examples("bash")) == 1
    assert len(examples("python")) == 1


@pytest.mark.parametrize(("code", "output"), examples("bash"))
def test_shell_examples_print_what_the_readme_shows(server: Server, code: str, output: str) -> None:
    script = code.replace("http://127.0.0.1:8000", server.base_url).replace(JQ, PYTHON)
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == output


@pytest.mark.parametrize(("code", "output"), examples("python"))
def test_python_examples_print_what_the_readme_shows(server: Server, code: str, output: str) -> None:
    script = code.replace("http://127.0.0.1:8000", server.base_url)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.rstrip("\n") == output.rstrip("\n")


def test_the_readme_installs_the_peers_that_the_benchmark_runs() -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "benchmarks" / "peers.py").read_text(encoding="utf-8"))) or ""
    (command,) = re.findall(r"^ *(npm install .*)$", docstring, re.MULTILINE)
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("docker", "clients/python", "contrib/vllm")),
]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_its_heading() -> None:
    for page in PAGES:
        for link, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}#{heading}"


def test_the_index_links_every_page_once() -> None:
    index = ROOT / "docs" / "README.md"
    links = [
        (index.parent / link).resolve()
        for link in re.findall(r"\]\(([^)#]+)\)", index.read_text(encoding="utf-8"))
        if not link.startswith("http")
    ]
    assert len(links) == len(set(links))
    assert {page for page in PAGES if page != index} <= set(links)
