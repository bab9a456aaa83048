"""The distribution alone: what a user gets who has nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {"anyio", "certifi", "h11", "httpcore", "httpx", "idna", "masquerade-client", "pip", "setuptools"}
TYPING = {"typing-extensions"}  # of anyio, on older Pythons


def run(*words: str) -> str:
    outcome = subprocess.run(words, capture_output=True, text=True, timeout=280)
    if outcome.returncode and "pip" in words:
        pytest.skip(f"no package index: {outcome.stderr[-200:]}")
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_the_wheel_needs_httpx_and_nothing_else(tmp_path: Path) -> None:
    python = str(tmp_path / "venv" / "bin" / "python")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT / "clients" / "python"))
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    (wheel,) = tmp_path.glob("*.whl")
    run(python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel))
    listed = run(python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").split()
    assert {line.partition("==")[0].lower().replace("_", "-") for line in listed} <= SMALL | TYPING
    said = run(python, "-c", "import masquerade_client as m, sys; print(m.Client, 'torch' in sys.modules)")
    assert said.strip().endswith("False")
    lacking = subprocess.run([python, "-m", "masquerade_client.cli"], capture_output=True, text=True)
    assert lacking.returncode == 1
    assert "masquerade-client[cli]" in lacking.stderr


def test_versions_agree() -> None:
    import masquerade_client

    declared = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]["version"]
    assert masquerade_client.__version__ == declared
