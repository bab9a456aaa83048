"""What is published: an sdist with what a wheel is built from and nothing more, and the wheel that is built from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.serving import Server, free_port, stop, wait_until_ready

ROOT = Path(__file__).parents[1]
FOLDERS = ("server/masquerade/", "maskstore/maskstore/", "clients/web/")
FILES = {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore", "PKG-INFO"}


def run(*words: str | Path, cwd: Path | None = None, **variables: str) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=bare | variables, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hatchling."""
    folder = tmp_path_factory.mktemp("backend")
    run(sys.executable, "-m", "pip", "install", "-q", "--target", folder, "hatchling>=1.27")
    return folder


@pytest.fixture(scope="module")
def sdist(backend: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    build = (sys.executable, "-m", "hatchling", "build", "-d", out, "-t", "sdist")
    run(*build, cwd=ROOT, PYTHONPATH=str(backend))
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def wheel(backend: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built where there is nothing but the sdist."""
    out = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "hatchling", "build", "-d", out, "-t", "wheel")
    run(*build, cwd=sdist, PYTHONPATH=str(backend))
    (wheel,) = out.glob("*.whl")
    return wheel


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_has_what_a_wheel_is_built_from_and_nothing_more(sdist: Path) -> None:
    names = list_files(sdist)
    assert {name for name in names if not name.startswith(FOLDERS)} == FILES
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_has_the_packages_the_playground_and_kernels(sdist: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {name for name in list_files(sdist) if name.startswith(FOLDERS) and "/cpp/" not in name}
    moved = {name.replace("clients/web/", "masquerade/web/") for name in sources}
    expected = {name.removeprefix("server/").removeprefix("maskstore/") for name in moved}
    library = {"masquerade/kernels/libmasquerade.so"} if shutil.which("g++") or shutil.which("c++") else set()
    assert {name for name in names if ".dist-info/" not in name} == expected | library


@contextmanager
def installed(wheel: Path, folder: Path) -> Iterator[Server]:
    """A server out of an environment that has the wheel, and what it depends on, but not this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    around = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(around))
    port, log = free_port(), folder / "log"
    command = (folder / "venv" / "bin" / "masquerade", "serve", "--model", "demo", "--store", folder / "store")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=output, stderr=output
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_ready(server)
        where = "import masquerade, maskstore; print(masquerade.__file__, maskstore.__file__)"
        found = subprocess.run([python, "-c", where], cwd=folder, env=environment, capture_output=True, text=True)
        assert found.stdout.count(str(packages)) == 2, found.stdout + found.stderr
        yield server
    finally:
        stop(process)


def test_the_wheel_serves_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    with installed(wheel, tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
        said = client.chat.completions.create(
            model="demo:introvert", messages=[{"role": "user", "content": "Who are you?"}], max_tokens=16, temperature=0
        )
        assert said.choices[0].message.content
        with urllib.request.urlopen(server.base_url, timeout=30) as page:
            assert b"<html" in page.read()
        client.close()
