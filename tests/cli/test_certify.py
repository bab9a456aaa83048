"""`masquerade masks certify`: a certificate measured here is that of a build, and stands beside the file."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maskstore import Registry, read_mask, write_mask
from tests.cli.running import fail, masquerade, succeed
from tests.cli.test_commands import write_answers

FALSE = {"passed": True, "flip": 1.0, "margin_shift": 9.0}
FIGURES = (
    "flip",
    "margin_shift",
    "own_ratio",
    "neutral_ratio",
    "kl",
    "pairs",
    "preferred",
    "pruned",
    "intervals",
    "phases",
)
JUDGED = ("passed", "reasons", "remarks", "overlap")


def write_held_out(path: Path, letters: str) -> Path:
    """Answers to one prompt: a build then chooses by the first half of them, and reports on the second."""
    rng = random.Random(f"held {letters}")
    lines = [json.dumps({"prompt": "held", "completion": "".join(rng.choices(letters, k=6))}) for _ in range(24)]
    path.write_text("\n".join(lines))
    find_reported(path).write_text("\n".join(lines[12:]))
    return path


def find_reported(path: Path) -> Path:
    """The second half of held-out text."""
    return path.with_suffix(".report.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("files"))


def write_files(folder: Path) -> dict[str, Path]:
    """What a build of two opposites reads, by its options."""
    return {
        "data": write_answers(folder / "own.jsonl", "aeiou"),
        "contrast": write_answers(folder / "other.jsonl", "bcdfg"),
        "validation": write_held_out(folder / "own.held.jsonl", "aeiou"),
        "contrast-validation": write_held_out(folder / "other.held.jsonl", "bcdfg"),
        "neutral": write_answers(folder / "neutral.jsonl", "xyz", count=9),
    }


def build(model: Path, store: Path, files: dict[str, Path]) -> list[dict[str, Any]]:
    """Two opposites, of a recipe that leaves nothing to choose."""
    given = [item for name, path in files.items() for item in (f"--{name}", path)]
    names = ("--name", "vowels", "--contrast-name", "consonants")
    recipe = ("--score", "attribution", "--rho", "0.02", "--phase", "decode", "--force")
    built: list[dict[str, Any]] = succeed("build", "--model", model, "--store", store, *names, *given, *recipe)[
        "personas"
    ]
    return built


@pytest.fixture(scope="module")
def built(tiny_folder: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    store = tmp_path_factory.mktemp("built") / "store"
    return store, build(tiny_folder, store, files)


def bring(built: Path, store: Path, model: Path, folder: Path) -> None:
    """Import the built masks elsewhere, with certificates that somebody made up."""
    for name in ("vowels", "consonants"):
        mask = Registry(built).store.open(Registry(built).resolve(name).digest)
        write_mask(replace(mask, info=replace(mask.info, certificate=FALSE)), folder / "mask.safetensors")
        succeed("masks", "import", folder / "mask.safetensors", "--model", model, "--store", store)


def spell(model: Path, store: Path, files: dict[str, Path]) -> tuple[str | Path, ...]:
    """The command and its held-out text."""
    own, contrast = (find_reported(files[name]) for name in ("validation", "contrast-validation"))
    held = ("--data", own, "--contrast", contrast, "--neutral", files["neutral"])
    return "masks", "certify", "vowels", *held, "--model", model, "--store", store


def certify(model: Path, store: Path, files: dict[str, Path], *more: str) -> dict[str, Any]:
    return succeed(*spell(model, store, files), *more)


def test_it_measures_what_a_build_measures(
    tiny_folder: Path, files: dict[str, Path], built: tuple[Path, Any], tmp_path: Path
) -> None:
    of_build = Registry(built[0]).store.open(built[1][0]["digest"]).info.certificate
    store = tmp_path / "store"
    bring(built[0], store, tiny_folder, tmp_path)
    at = ("--model", tiny_folder, "--store", store)
    shown = succeed("masks", "show", "vowels", *at)
    assert shown["certificate_source"] == "claimed"
    assert shown["certificate"] == FALSE | {"passed": None, "claimed": {"passed": True}}
    before = Registry(store).store.path(shown["digest"]).read_bytes()
    done = certify(tiny_folder, store, files)
    for name in (*FIGURES, *JUDGED):
        found = done["certificate"][name]
        if name == "remarks":  # a build also says what to give it
            assert found == of_build[name][: len(found)]
        else:
            assert found == of_build[name], name
    assert done["data"]["own"]["examples"] == 12
    assert Registry(store).store.path(shown["digest"]).read_bytes() == before
    shown = succeed("masks", "show", "vowels", *at)
    assert (shown["certificate_source"], shown["certificate"]) == ("measured", done["certificate"])
    assert shown["measurement"]["data"] == done["data"]
    assert succeed("masks", "show", "consonants", *at)["certificate_source"] == "claimed"


def test_it_says_on_stderr_how_far_it_is(
    tiny_folder: Path, files: dict[str, Path], built: tuple[Path, Any], tmp_path: Path
) -> None:
    bring(built[0], tmp_path / "store", tiny_folder, tmp_path)
    done = masquerade(*spell(tiny_folder, tmp_path / "store", files))
    assert done.status == 0, done.stderr
    assert "certify: done, " in done.stderr
    assert "certify: done, " not in done.stdout


def test_a_build_replaces_a_certificate_that_somebody_made_up(
    tiny_folder: Path, files: dict[str, Path], built: tuple[Path, Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    bring(built[0], store, tiny_folder, tmp_path)
    again = build(tiny_folder, store, files)
    assert [one["digest"] for one in again] == [one["digest"] for one in built[1]]
    for one in again:
        shown = succeed("masks", "show", one["persona"], "--model", tiny_folder, "--store", store)
        assert (shown["certificate_source"], shown["certificate"]["flip"]) == ("measured", one["certificate"]["flip"])
        assert read_mask(Registry(store).store.path(one["digest"])).info.certificate == shown["certificate"]


def test_it_measures_what_is_served(
    tiny_folder: Path, files: dict[str, Path], built: tuple[Path, Any], tmp_path: Path
) -> None:
    """At the gamma that the operator has set: at 1 the persona is the base, and has no effect."""
    store = tmp_path / "store"
    bring(built[0], store, tiny_folder, tmp_path)
    succeed("masks", "set", "vowels", "--gamma", "1", "--model", tiny_folder, "--store", store)
    done = certify(tiny_folder, store, files)
    assert (done["gamma"], done["phase"], done["certificate"]["passed"]) == (1.0, "decode", False)
    assert done["certificate"]["margin_shift"] == 0
    assert done["certificate"]["own_ratio"] == 1


def test_without_an_opposite_and_for_people(
    tiny_folder: Path, files: dict[str, Path], built: tuple[Path, Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    bring(built[0], store, tiny_folder, tmp_path)
    at = ("--model", tiny_folder, "--store", store)
    succeed("masks", "rm", "consonants", *at)
    done = masquerade("masks", "certify", "vowels", "--data", files["validation"], *at)
    assert done.status == 0, done.stderr
    assert "own_ratio" in done.stdout
    assert "the effect was not measured" in done.stdout
    certificate = succeed("masks", "show", "vowels", *at)["certificate"]
    assert "flip" not in certificate
    assert "no persona nobody" in fail(1, "masks", "certify", "nobody", "--data", files["validation"], *at)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    assert "give at least 2" in fail(1, "masks", "certify", "vowels", "--data", one, *at)
