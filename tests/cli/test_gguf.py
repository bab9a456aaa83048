"""GGUF files on the command line: served, built on, evaluated, and what is said where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from maskstore import write_mask
from masquerade.cli.progress import LINE_SECONDS, report_quarters, report_stages
from masquerade.model import load
from tests import world
from tests.cli.running import fail, masquerade, succeed
from tests.cli.test_commands import write_answers
from tests.model import ggufs
from tests.serving import Server, serve


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    pack = ggufs.quantise(ggufs.Kind.Q8_0)
    return ggufs.write(folder / "Tiny-Model.Q8_0.gguf", ggufs.make_model("llama"), pack).path


def ask(server: Server, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12} | more
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def list_models(server: Server) -> list[str]:
    return [model["id"] for model in httpx.get(f"{server.base_url}/v1/models").json()["data"]]


def test_a_mask_of_the_safetensors_is_served_with_the_gguf(file: Path, tmp_path: Path) -> None:
    base = load(str(file), device="cpu")
    for part in (base.model, base.tokenizer):
        part.save_pretrained(tmp_path / "saved")
    dense = load(str(tmp_path / "saved"), device="cpu")
    write_mask(world.make_mask(dense, 0.3, 0, "p"), tmp_path / "p.safetensors")
    for model in (file, tmp_path / "saved"):
        store = tmp_path / f"store-{model.name}"
        succeed("masks", "import", tmp_path / "p.safetensors", "--model", model, "--store", store)
        assert succeed("masks", "verify", tmp_path / "p.safetensors", "--model", model)["persona"] == "p"

    answers = []
    for model in (str(file), str(tmp_path / "saved")):
        store = tmp_path / f"store-{Path(model).name}"
        with serve("--model", model, "--store", str(store), "--dtype", "bfloat16") as server:
            name, _ = list_models(server)
            unmasked, masked = ask(server, model=name), ask(server, model=name, persona="p")
            answers.append([one["choices"][0]["message"]["content"] for one in (unmasked, masked)])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_a_model_is_called_by_its_file_or_as_it_is_told(file: Path, tmp_path: Path) -> None:
    with serve("--model", str(file)) as server:
        assert list_models(server) == ["Tiny-Model.Q8_0"]
        assert ask(server, model="Tiny-Model.Q8_0")["model"] == "Tiny-Model.Q8_0"
        assert "loading the model: 100 % of 0 MB" in server.said()
    options = ["--store", str(tmp_path / "s"), "--served-model-name", "our/model"]
    mask = world.make_mask(load(str(file), device="cpu"), 0.3, 0, "p")
    write_mask(mask, tmp_path / "p.safetensors")
    succeed("masks", "import", tmp_path / "p.safetensors", "--model", file, "--store", tmp_path / "s")
    with serve("--model", str(file.parent), *options) as server:
        assert list_models(server) == ["our/model", "our/model:p"]
        assert ask(server, model="our/model:p")["persona"] == "p"


def test_rounded_inputs_are_another_form_of_the_base(file: Path, tmp_path: Path) -> None:
    """A persona needs a certificate there, or the user's word; the plan counts the file's blocks."""
    at = ("--model", str(file), "--quantization", "a8")
    weights = succeed("plan", *at, "--json")["weights"]
    assert weights["served"] == weights["a8"] < 0.7 * weights["bfloat16"]
    store = ("--store", str(tmp_path / "s"))
    write_mask(world.make_mask(load(str(file), device="cpu"), 0.3, 0, "p"), tmp_path / "p.safetensors")
    succeed("masks", "import", tmp_path / "p.safetensors", "--model", file, *store)
    with serve(*at, *store) as server:
        assert "not served without a certificate on a8 weights: p" in server.said()
        (name,) = list_models(server)
        base = ask(server, model=name)
    with serve(*at, *store, "--accept-uncertified") as server:
        assert ask(server, model=name)["choices"] == base["choices"]
        assert ask(server, model=name, persona="p")["choices"] != base["choices"]


@pytest.mark.parametrize("name", ["", "a:b", "x" * 129, "two\nlines"])
def test_a_name_that_cannot_be_is_refused(file: Path, name: str) -> None:
    said = fail(2, "serve", "--model", file, "--served-model-name", name)
    assert "--served-model-name must be 1 to 128 printable characters without a colon" in said


def test_a_persona_is_built_and_measured_on_a_gguf(file: Path, tmp_path: Path) -> None:
    own, other = (write_answers(tmp_path / f"{letters}.jsonl", letters) for letters in ("aei", "bcd"))
    store = ["--model", file, "--store", tmp_path / "s"]
    done = masquerade(
        *("build", *store, "--name", "vowels", "--data", own, "--contrast", other, "--json"),
        *("--force", "--score", "signed", "--rho", "0.1"),
    )
    assert done.status == 0, done.stderr
    assert "loading the model: 100 % of 0 MB\n" in done.stderr
    report = succeed(
        *("eval", *store, "--persona", "vowels", "--data", own, "--contrast", other, "--baselines", "none"),
    )
    assert report["examples"] > 0


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], "but the file has"),
        (lambda raw: b"PK" + raw[2:], "is not a GGUF file"),
        (lambda raw: raw.replace(b"llama.block_count", b"llama.block_cound"), "llama.block_count: is missing"),
    ],
)
@pytest.mark.parametrize("command", [("serve",), ("masks", "ls")])
def test_a_damaged_file_is_one_line(
    file: Path, tmp_path: Path, command: tuple[str, ...], spoil: Callable[[bytes], bytes], words: str
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(spoil(file.read_bytes()))
    said = fail(1, *command, "--model", bad)
    assert str(bad) in said
    assert words in said


def test_progress_is_told_by_quarters() -> None:
    said: list[str] = []
    report = report_quarters(said.append)
    for done in range(0, 2_000_001, 100_000):
        report(done, 2_000_000)
    assert said == [f"loading the model: {share} % of 2 MB" for share in (25, 50, 75, 100)]


def test_a_stage_is_told_once_and_again_if_it_takes_long() -> None:
    said: list[str] = []
    times = iter([0, 1, 2, 3, 3 + LINE_SECONDS, 4 + LINE_SECONDS])
    report = report_stages(said.append, clock=lambda: next(times))
    for stage in ("a", "a", "b", "b", "b"):
        report(stage)
    assert said == ["1 s: a", "3 s: b", f"{3 + LINE_SECONDS:.0f} s: b"]
