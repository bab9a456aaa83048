"""Models in the store of Ollama: the GGUF file of a name.

Names and folders are those of Ollama's types/model/name.go and manifest/paths.go: `[host/][namespace/]model[:tag]`, a
manifest for each name, and its layers as blobs that are called by their digests.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masquerade.errors import UnusableModel

PREFIX = "ollama:"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_FOLDERS = ("manifests-v2", "manifests")  # the newer one first
_HOSTS = (_HOST, "ollama.com")  # two names of the same registry
_WEIGHTS, _ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
_PART = re.compile(r"\w[\w.-]{0,79}", re.ASCII)
_HOST_PART = re.compile(r"\w[\w.:-]{0,349}", re.ASCII)
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_SERVICE = "/usr/share/ollama/.ollama/models"  # of the service that Ollama's installer for Linux sets up


@dataclass(frozen=True)
class OllamaName:
    """A model's name with what Ollama adds where a part is left out."""

    given: str  # without the tag
    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> OllamaName:
        """Read `[host/][namespace/]model[:tag]`. Raises `UnusableModel` if it is no such name."""
        given, colon, tag = text.rpartition(":")
        if not colon or "/" in tag:  # a colon before a slash is that of a port
            given, tag = text, _TAG
        parts = given.split("/")
        host, namespace, model = [_HOST, _NAMESPACE, ""][: max(0, 3 - len(parts))] + parts[-3:]
        whole = len(parts) <= 3 and _HOST_PART.fullmatch(host) and all(map(_PART.fullmatch, (namespace, model, tag)))
        if not whole or "." in namespace:
            raise UnusableModel(
                f"{PREFIX}{text:.200}: is no name of Ollama's; expected {PREFIX}[HOST/][USER/]MODEL[:TAG]"
            )
        return cls(given, host, namespace, model, tag)

    def __str__(self) -> str:
        return f"{self.given}:{self.tag}"


def find_ollama(text: str) -> tuple[str, Path]:
    """The name without its tag, and the GGUF file, of `NAME[:TAG]` in Ollama's store.

    The store is `$OLLAMA_MODELS` or `~/.ollama/models`. Raises `UnusableModel` that says what is missing.
    """
    name = OllamaName.parse(text)
    store = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models").absolute()
    try:
        manifest = _find_manifest(store, name)
        digest = _find_digest(name, manifest)
        blob = store / "blobs" / f"sha256-{digest}"
        if not blob.is_file():
            raise _refuse(name, f"its weights are missing: {blob} is not there; `ollama pull {name}` gets them")
    except OSError as error:
        raise _refuse(name, f"Ollama's store {store} cannot be read: {error}") from error
    return name.given, blob


def _refuse(name: OllamaName, reason: str) -> UnusableModel:
    return UnusableModel(f"{PREFIX}{name}: {reason}")


def _find_manifest(store: Path, name: OllamaName) -> Path:
    """The manifest of a name. Versions of Ollama differ in its folder and in the host's name."""
    if not store.is_dir():
        raise _refuse(
            name,
            f"Ollama's store {store} is not there; set OLLAMA_MODELS to the folder that has it (the Linux service's is "
            f"{_SERVICE}), or install Ollama and `ollama pull {name}`",
        )
    hosts = _HOSTS if name.host in _HOSTS else (name.host,)
    models = [store / folder / host / name.namespace / name.model for folder in _FOLDERS for host in hosts]
    for model in models:
        if (model / name.tag).is_file():
            return model / name.tag
    tags = sorted({path.name for model in models if model.is_dir() for path in model.iterdir()})
    known = f"; it has the tags {', '.join(tags):.200}" if tags else ""
    raise _refuse(name, f"is not in Ollama's store {store}{known}; `ollama pull {name}` gets it")


def _find_digest(name: OllamaName, manifest: Path) -> str:
    """The hash of the weights, in hexadecimal digits."""
    try:
        layers: list[dict[str, Any]] = json.loads(manifest.read_bytes())["layers"]
        kinds = [layer["mediaType"] for layer in layers]
        found = [_DIGEST.fullmatch(layer["digest"]) for layer in layers if layer["mediaType"] == _WEIGHTS]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        again = f"`ollama pull {name}` writes it again"
        raise _refuse(name, f"{manifest} is not a manifest of layers ({error!r:.80}); {again}") from error
    if _ADAPTER in kinds:
        raise _refuse(name, "has a LoRA adapter, which is not supported; serve its base, or merge the adapter into it")
    if len(found) != 1 or found[0] is None:
        raise _refuse(
            name,
            f"{manifest} has {len(found)} layers of the type {_WEIGHTS}; expected one, with a digest sha256:...",
        )
    return found[0][1].lower()
