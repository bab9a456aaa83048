"""`masquerade ray build`: many personas as tasks, of which one that fails stops no other."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from maskstore import Registry
from masquerade.cli.build import DATA_FILES, build
from masquerade.cli.ray import read_builds
from masquerade.cluster.builds import BuildTask, _run
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
        ("[[persona]]\nname = 'a'\ndata = 'a.jsonl'\n", r"1: --data a.jsonl cannot be read: No such file"),
        (f"[[persona]]\nname = 'a'\nneutral = '{'a' * 300}'\n", "--neutral a{80} cannot be read: File name too long"),
    ],
)
def test_a_file_that_cannot_be_built_is_refused_before_anything_starts(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "personas.toml"
    file.write_text(text)
    with pytest.raises(InvalidValue, match=said):
        read_builds(file)


def test_the_data_files_of_a_build_are_read_and_nothing_else(tmp_path: Path) -> None:
    for name in ("casual", "pool", "weights.gguf", "mine.jsonl", "other.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text(f"content of {name}")
    file = tmp_path / "personas.toml"
    file.write_text(
        f"""
[[persona]]
name = "casual"
model = "weights.gguf"
data = "mine.jsonl"
contrast = "pool"
pool = ["mine.jsonl", "other.jsonl"]

[[persona]]
name = "casual"
model = "demo"
system-prompt = "{"You are casual. " * 400}"
contrast-prompt = "casual"
prompts = "questions.jsonl"
"""
    )
    (tmp_path / "demo").mkdir()  # `masquerade build` takes the model that is called so
    pooled, prompted = read_builds(file)
    assert pooled.files == {
        ("--data", "mine.jsonl"): b"content of mine.jsonl",
        ("--pool", "mine.jsonl"): b"content of mine.jsonl",
        ("--pool", "other.jsonl"): b"content of other.jsonl",
    }
    assert ("--model", str(tmp_path / "weights.gguf")) in pooled.options
    assert prompted.files == {("--prompts", "questions.jsonl"): b"content of questions.jsonl"}
    assert ("--model", "demo") in prompted.options


def test_the_data_files_are_the_options_that_take_paths() -> None:
    paths = {f"--{name.replace('_', '-')}" for name, kind in get_type_hints(build).items() if "Path" in str(kind)}
    assert paths - {"--store", "--scratch", "--out"} | {"--contrast"} == DATA_FILES  # which may also be `pool`


def be_masquerade(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `python -m masquerade` run a program."""
    (folder / "masquerade").mkdir()
    (folder / "masquerade" / "__init__.py").touch()
    (folder / "masquerade" / "__main__.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(folder)


@pytest.mark.timeout(60)
def test_a_report_may_be_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe of a process takes 64 kB until somebody reads."""
    program = """
import json, sys
print(json.dumps({"personas": [{"persona": "x" * 700_000}]}), flush=True)
print("built", file=sys.stderr)
"""
    be_masquerade(tmp_path, program, monkeypatch)
    outcome = _run(BuildTask("long", [("--name", "long")]))
    assert outcome.status == 0
    assert outcome.last_line == "built"
    assert [len(one["persona"]) for one in outcome.personas] == [700_000]


def test_only_the_value_that_names_a_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import json, sys
from pathlib import Path
_, _, _, _, name, _, data, *flags = sys.argv
print(json.dumps({"personas": [{"name": name, "content": Path(data).read_text(), "flags": flags}]}))
"""
    be_masquerade(tmp_path, program, monkeypatch)
    options = [("--name", "casual"), ("--data", "casual"), ("--force", "")]
    outcome = _run(BuildTask("casual", options, {("--data", "casual"): b"lines"}))
    assert [*outcome.personas] == [{"name": "casual", "content": "lines", "flags": ["--force"]}]


@pytest.mark.long
@pytest.mark.parametrize("wanted", [("--cpus", "100000"), ("--gpus", "1000")])
def test_what_this_machine_never_has_is_refused(tmp_path: Path, wanted: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "masquerade", "ray", "build", str(write_personas(tmp_path)), "--address", "local"]
    ended = subprocess.run([*command, *wanted], env=ENV, capture_output=True, text=True, check=False, cwd="/")
    assert ended.returncode == 2, ended.stderr
    assert f"{wanted[0]} is {float(wanted[1]):g}, and there are" in ended.stderr


@pytest.mark.parametrize(
    ("cpus", "variables", "said"),
    [(1, {"RAY_TMPDIR": __file__}, ".*Not a directory"), (-1, {}, "Resource quantities must be nonnegative")],
)
def test_a_ray_that_does_not_start_says_why(cpus: int, variables: dict[str, str], said: str) -> None:
    """In a process of its own, which ends what Ray has started of itself."""
    program = f"from masquerade.cluster.connection import *\nconnect(LOCAL, cpus={cpus}).__enter__()"
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=ENV | variables, capture_output=True, text=True, check=False)
    last = ended.stderr.splitlines()[-1]
    assert re.search(f"NotReady: Ray does not start on this machine: {said}.*ray/session_latest/logs$", last), last
