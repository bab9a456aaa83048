"""`masquerade ray build`: many personas as tasks, of which one that fails stops no other."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from maskstore import Registry
from masquerade.cli.ray import read_builds
from masquerade.demo import DATA
from masquerade.errors import InvalidValue

pytestmark = pytest.mark.timeout(600)
ENV = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "OMP_NUM_THREADS": "1",
}


def write_personas(folder: Path) -> Path:
    """Two personas that can be built, with their data beside the file, and one whose data is none."""
    for name in ("casual", "formal"):
        lines = (DATA / f"{name}.train.jsonl").read_text().splitlines()[:24]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "broken.jsonl").write_text("not JSON\n")
    file = folder / "personas.toml"
    file.write_text(
        f"""
[build]
model = "demo"
store = "{folder / "store"}"
score = "contrastive-wanda"
rho = 0.01
group = "layer"
phase = "all"
force = true

[[persona]]
name = "mate"
data = "casual.jsonl"
contrast = "formal.jsonl"

[[persona]]
name = "broken"
data = "broken.jsonl"

[[persona]]
name = "clerk"
data = "formal.jsonl"
contrast = "casual.jsonl"
"""
    )
    return file


@pytest.mark.long
def test_each_persona_is_built_and_the_broken_one_named(tmp_path: Path) -> None:
    file = write_personas(tmp_path)
    command = [sys.executable, "-m", "masquerade", "ray", "build", str(file), "--address", "local", "--json"]
    ended = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False, cwd="/")
    assert ended.returncode == 1, ended.stderr
    report = json.loads(ended.stdout)
    assert sorted(one["persona"] for one in report["personas"]) == ["clerk", "mate"]
    assert "broken.jsonl" in report["failed"]["broken"]
    assert "3 of 3" in ended.stderr
    assert ended.stderr.splitlines()[-1].endswith("1 of 3 builds failed: broken")
    assert {"clerk", "mate"} <= {revision.name for revision in Registry(tmp_path / "store").names()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[persona]]\nname = 'a'\nruo = 0.1\n", r"personas.toml: \[\[persona\]\] 1: No such option: --ruo"),
        ("[[persona]]\ndata = 'a.jsonl'\n", "Missing option '--name'"),
        ("[[persona]]\nname = 'a'\neffect = 'much'\n", "effect"),
        ("[[persona]]\nname = 'a'\nshards = 2\n", "`masquerade build --shards` divides a build"),
        ("[builds]\nmodel = 'demo'\n", r"must have a table \[\[persona\]\]"),
        ("persona = 3\n", r"must have a table \[\[persona\]\]"),
        ("persona = [3]\n", r"must have a table \[\[persona\]\]"),
        ("[", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_built_is_refused_before_anything_starts(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "personas.toml"
    file.write_text(text)
    with pytest.raises(InvalidValue, match=said):
        read_builds(file)
