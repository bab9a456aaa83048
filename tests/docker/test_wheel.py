"""What is installed is whole: the wheel, made of what the image's build gets to see, serves without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.docker.manifests import ROOT

LOOK = """
from masquerade import demo
from masquerade.http import playground
from masquerade.app import describe
print(playground.FOLDER.parent.parent, (playground.FOLDER / "index.html").is_file(), len(list(demo.PERSONAS.iterdir())))
"""


def test_the_wheel_has_the_playground_and_the_demo(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    seen = [line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    for name in seen:
        (source / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    environment = os.environ | {"CXX": "false"}  # kernels are compiled elsewhere often enough
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = archive.namelist()
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o"))]
    told = subprocess.run(
        [sys.executable, "-P", "-c", LOOK],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
    ).stdout.split()
    assert told == [str(tmp_path / "installed"), "True", "8"]
