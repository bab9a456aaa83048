"""Quantised bases from the command line and over HTTP: which checkpoints load, and which personas are served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import world
from tests.cli.running import fail
from tests.cli.test_commands import write_answers


@pytest.mark.parametrize("command", ["serve", "build", "eval", "certify", "plan"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_checkpoint_of_another_quantisation_is_refused_by_name(tmp_path: Path, command: str, method: str) -> None:
    folder = world.make_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    data = write_answers(tmp_path / "own.jsonl", "aeiou")
    rest = {
        "serve": ("serve", "--port", "0"),
        "build": ("build", "--data", data, "--contrast", data, "--name", "p"),
        "eval": ("eval", "--persona", "p", "--data", data, "--contrast", data),
        "certify": ("masks", "certify", "p", "--data", data),
        "plan": ("plan",),
    }[command]
    store = () if command == "plan" else ("--store", tmp_path / "store")
    said = fail(1, *rest, "--model", folder, *store)
    assert f"'m' is quantised with '{method}' in its files; take the unquantised checkpoint" in said
    assert "GGUF" in said
