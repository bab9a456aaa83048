"""Quantised bases from the command line and over HTTP: which checkpoints load, and which personas are served."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskstore import BaseRef, Mask, MaskInfo, Registry, encode, fingerprint
from masquerade.model.quantized import QUANTIZATIONS
from tests import serving, world
from tests.cli.running import fail, succeed
from tests.cli.test_certify import build, certify, write_files
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
        "build": (
            "build",
            "--data",
            data,
            "--contrast",
            write_answers(tmp_path / "other.jsonl", "bcdfg"),
            "--name",
            "p",
        ),
        "eval": ("eval", "--persona", "p", "--data", data, "--contrast", data),
        "certify": ("masks", "certify", "p", "--data", data),
        "plan": ("plan",),
    }[command]
    store = () if command == "plan" else ("--store", tmp_path / "store")
    if command == "eval":
        targets = {"model.layers.0.mlp.up_proj": encode(np.zeros((8, 8), bool))}
        mask = Mask(BaseRef(fingerprint(folder), "m"), targets, MaskInfo("p", "random"))
        registry = Registry(tmp_path / "store")
        registry.publish("p", registry.store.add(mask))
    said = fail(1, *rest, "--model", folder, *store)
    assert f"'m' is quantised with '{method}' in its files; take the unquantised checkpoint" in said
    assert "GGUF" in said


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def store(tiny_folder: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two personas that were found and measured on the unquantised base."""
    folder = tmp_path_factory.mktemp("found") / "store"
    build(tiny_folder, folder, files)
    return folder


def ask(server: serving.Server, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.base_url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def chat(server: serving.Server, persona: str) -> tuple[int, Any]:
    model = ask(server, "/v1/models")[1]["data"][0]["id"]
    messages = [{"role": "user", "content": "hi"}]
    return ask(server, "/v1/chat/completions", {"model": model, "persona": persona, "messages": messages})


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_each_quantisation_has_a_certificate_of_its_own(
    tiny_folder: Path,
    files: dict[str, Path],
    store: Path,
    how: str,
) -> None:
    at = ("--model", tiny_folder, "--store", store)
    before = succeed("masks", "show", "vowels", *at)
    done = certify(tiny_folder, store, files, "--quantization", how)
    assert (done["quantization"], done["certificate"]["quantization"]) == (how, how)
    shown = succeed("masks", "show", "vowels", *at)
    assert shown["certificate"] == before["certificate"]
    measured = {one["quantization"]: one["certificate"] for one in shown["measurements"]}
    assert measured[how] == done["certificate"]
    assert measured[None] == before["certificate"]
    assert measured[how]["margin_shift"] != measured[None]["margin_shift"]


def test_a_server_with_a_quantised_base_waits_for_the_certificate(
    tiny_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    build(tiny_folder, store, files)
    at = ("--model", str(tiny_folder), "--store", str(store), "--quantization", "nf4")
    with serving.serve(*at) as server:
        assert "not served without a certificate on nf4 weights: consonants, vowels" in server.said()
        status, answer = chat(server, "vowels")
        assert (status, answer["error"]["code"]) == (404, "persona_not_found")
        assert "`masquerade masks certify vowels --quantization nf4` does that" in answer["error"]["message"]
        certify(tiny_folder, store, files, "--quantization", "nf4")
        registry = Registry(store)
        digest = registry.resolve("vowels").digest
        (found,) = (one for one in registry.measurements(digest) if one.quantization == "nf4")
        registry.record(replace(found, certificate={**found.certificate, "passed": False, "reasons": ["no effect"]}))
        assert "its certificate on nf4 weights is a refusal: no effect" in chat(server, "vowels")[1]["error"]["message"]
        registry.record(replace(found, certificate={**found.certificate, "passed": True}))
        assert chat(server, "vowels")[0] == 200
        listed = {one["id"]: one["served"] for one in ask(server, "/v1/personas")[1]["data"]}
        assert listed == {"consonants": False, "vowels": True}
    with serving.serve(*at, "--accept-uncertified") as server:
        assert "served without a certificate on nf4 weights: consonants" in server.said()
        assert chat(server, "consonants")[0] == 200
        assert "the persona consonants is served without a certificate: it was not measured on nf4" in server.said()
        assert ask(server, "/v1/personas/consonants")[1]["warning"].startswith("it was not measured on nf4 weights")


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_a_build_on_a_quantised_base_is_certified_there(
    tiny_folder: Path,
    files: dict[str, Path],
    tmp_path: Path,
    how: str,
) -> None:
    given = [item for name, path in files.items() for item in (f"--{name}", path)]
    at = ("--model", tiny_folder, "--store", tmp_path / "store")
    recipe = ("--score", "attribution", "--rho", "0.02", "--force", "--quantization", how)
    succeed("build", *at, "--name", "vowels", *given, *recipe)
    shown = succeed("masks", "show", "vowels", *at)
    assert (shown["certificate_source"], shown["measurement"]["quantization"]) == ("measured", how)
    assert shown["certificate"]["quantization"] == how
