"""Ollama's store: a folder in its layout is read as Ollama reads it, and what is missing is named."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx
import pytest

from masquerade.errors import UnusableModel
from masquerade.model import load
from masquerade.ollama import OllamaName
from masquerade.plan.outline import read_outline
from masquerade.sources import find_model
from tests.model import ggufs
from tests.serving import serve

IMAGE = "application/vnd.ollama.image"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return ggufs.write(path, ggufs.make_model("llama"), ggufs.quantise(ggufs.Kind.Q8_0)).path.read_bytes()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "blobs").mkdir()
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    return tmp_path


def add_blob(store: Path, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    (store / "blobs" / f"sha256-{digest}").write_bytes(content)
    return f"sha256:{digest}"


def add_manifest(path: Path, *layers: tuple[str, str]) -> Path:
    """As `ollama pull` writes it; `layers` are kinds and digests."""
    listed = [{"mediaType": f"{IMAGE}.{kind}", "digest": digest, "size": 1} for kind, digest in layers]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": listed}))
    return path


def pull(store: Path, weights: bytes, path: str = "manifests/registry.ollama.ai/library/tiny/latest") -> Path:
    """Put a model into the store, with the template that Ollama keeps beside it; returns the blob of its weights."""
    digest = add_blob(store, weights)
    template = add_blob(store, b"{{ .Prompt }}")
    add_manifest(store / path, ("template", template), ("model", digest), ("license", template))
    return store / "blobs" / digest.replace(":", "-")


def test_a_store_that_cannot_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like that of another user. Who runs the tests may read all, but no file has so long a name."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / ("x" * 300)))
    with pytest.raises(UnusableModel, match=r"Ollama's store .* cannot be read"):
        find_model("ollama:tiny")


@pytest.mark.parametrize(
    ("given", "name", "path"),
    [
        ("tiny", "tiny", "manifests/registry.ollama.ai/library/tiny/latest"),
        ("tiny:1.5b-q8_0", "tiny", "manifests/registry.ollama.ai/library/tiny/1.5b-q8_0"),
        ("library/tiny", "library/tiny", "manifests/registry.ollama.ai/library/tiny/latest"),
        ("user/tiny:x", "user/tiny", "manifests/registry.ollama.ai/user/tiny/x"),
        ("hf.co/owner/Tiny-GGUF:Q8_0", "hf.co/owner/Tiny-GGUF", "manifests/hf.co/owner/Tiny-GGUF/Q8_0"),
        ("127.0.0.1:5000/me/tiny", "127.0.0.1:5000/me/tiny", "manifests/127.0.0.1:5000/me/tiny/latest"),
        ("tiny", "tiny", "manifests-v2/ollama.com/library/tiny/latest"),
        ("tiny", "tiny", "manifests/ollama.com/library/tiny/latest"),
        ("ollama.com/user/tiny", "ollama.com/user/tiny", "manifests/registry.ollama.ai/user/tiny/latest"),
    ],
)
def test_a_name_is_found_where_ollama_keeps_it(store: Path, weights: bytes, given: str, name: str, path: str) -> None:
    blob = pull(store, weights, path)
    files = find_model(f"ollama:{given}")
    assert (files.name, files.path, files.is_gguf) == (name, blob, True)


def test_the_newer_folder_counts_first(store: Path, weights: bytes) -> None:
    pull(store, b"GGUF, an older one")
    blob = pull(store, weights, "manifests-v2/ollama.com/library/tiny/latest")
    assert find_model("ollama:tiny").path == blob


def test_the_store_is_in_the_home_unless_it_is_elsewhere(
    tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    store = tmp_path / ".ollama" / "models"
    with pytest.raises(UnusableModel, match=rf"Ollama's store {store} is not there; set OLLAMA_MODELS"):
        find_model("ollama:tiny")
    (store / "blobs").mkdir(parents=True)
    blob = pull(store, weights)
    assert find_model("ollama:tiny").path == blob


def test_it_is_the_model_of_its_file(store: Path, weights: bytes) -> None:
    blob = pull(store, weights)
    (store / "m.gguf").write_bytes(weights)
    found, file = load("ollama:tiny", device="cpu"), load(str(store / "m.gguf"), device="cpu")
    assert (found.name, found.fingerprint) == ("tiny", file.fingerprint)
    plain = load(str(blob), device="cpu")
    assert (plain.name, plain.fingerprint) == (blob.name, file.fingerprint)
    assert read_outline(find_model("ollama:tiny", download=False), "cpu").name == "tiny"


def test_it_is_served_under_its_name(store: Path, weights: bytes) -> None:
    pull(store, weights, "manifests/hf.co/owner/Tiny-GGUF/Q8_0")
    with serve("--model", "ollama:hf.co/owner/Tiny-GGUF:Q8_0") as server:
        body = {"model": "hf.co/owner/Tiny-GGUF", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["model"]) == (200, "hf.co/owner/Tiny-GGUF")


def test_a_model_without_a_template_is_refused_and_its_file_is_not(store: Path, tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "m.gguf", ggufs.make_model("llama"), leave_out=["tokenizer.chat_template"]).path
    blob = pull(store, path.read_bytes())
    with pytest.raises(UnusableModel, match=rf"ollama:tiny: its GGUF has no chat template .*`--model {blob}` serves"):
        load("ollama:tiny", device="cpu")
    assert load(str(blob), device="cpu").tokenizer.chat_template is None


class TestMissing:
    def refuse(self, name: str, words: str) -> None:
        with pytest.raises(UnusableModel, match=words):
            find_model(f"ollama:{name}")

    def test_a_model(self, store: Path) -> None:
        self.refuse("tiny", rf"ollama:tiny:latest: is not in Ollama's store {store}; `ollama pull tiny:latest` gets it")

    def test_a_tag(self, store: Path, weights: bytes) -> None:
        for tag in ("1b", "3b"):
            pull(store, weights, f"manifests/registry.ollama.ai/library/tiny/{tag}")
        self.refuse("tiny", "it has the tags 1b, 3b; `ollama pull tiny:latest` gets it")

    def test_a_blob(self, store: Path, weights: bytes) -> None:
        blob = pull(store, weights)
        blob.unlink()
        self.refuse("tiny", rf"{blob} is not there; `ollama pull tiny:latest` gets them")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": 1}', '{"layers": [1]}', '{"layers": [{}]}', "\udcff"])
    def test_a_manifest_that_is_none(self, store: Path, text: str) -> None:
        path = add_manifest(store / "manifests/registry.ollama.ai/library/tiny/latest")
        path.write_bytes(text.encode(errors="surrogateescape"))
        self.refuse("tiny", rf"{path} is not a manifest of layers .*`ollama pull tiny:latest` writes it again")

    @pytest.mark.parametrize(
        ("layers", "words"),
        [
            ([], "has 0 layers of the type application/vnd.ollama"),
            ([("template", "sha256:" + 64 * "0")], "has 0 layers of the type"),
            ([("model", "sha256:" + 64 * "0")] * 2, "has 2 layers of the type"),
            (
                [("model", "sha256:../../secret")],
                "has 1 layers of the type .*; expected one, with a digest sha256:",
            ),
            ([("model", "sha256:" + 64 * "0"), ("adapter", "sha256:" + 64 * "1")], "has a LoRA adapter"),
        ],
    )
    def test_layers_that_are_no_model(self, store: Path, layers: list[tuple[str, str]], words: str) -> None:
        add_manifest(store / "manifests/registry.ollama.ai/library/tiny/latest", *layers)
        self.refuse("tiny", words)


@pytest.mark.parametrize(
    "name", ["", ":", "a:", ":b", "../x", "a/../b", "a/b/c/d", "a//b", "/a", "us.er/a", "x y", "é", "a:b:c/", 81 * "x"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UnusableModel, match="is no name of Ollama's; expected ollama:"):
        OllamaName.parse(name)


def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"ustar")
    with pytest.raises(UnusableModel, match=r"is a file; give the folder .* or a file in GGUF"):
        find_model(str(tmp_path / "blob"))
