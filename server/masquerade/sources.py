"""Where a base model's files are: with the package, in a folder, in a GGUF file, in a registry, or on the hub.

Reads no weights but those that identify a model, and so needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from maskstore import fingerprint, fingerprint_tensors
from masquerade import demo
from masquerade.errors import UnusableModel
from masquerade.packaged import PACKAGED, find_packaged

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_NAMES = ", ".join(f"`{name}`" for name in (demo.NAME, *PACKAGED))
GGUF = ".gguf"


@dataclass(frozen=True)
class ModelFiles:
    """The files of a base model."""

    name: str  # what the API calls it, unless it is told otherwise
    path: Path  # a folder as transformers saves it, or a GGUF file

    @property
    def is_gguf(self) -> bool:
        """Whether it is one GGUF file."""
        return self.path.is_file()

    def fingerprint(self) -> str:
        """What masks know the model by; the same for a GGUF and for the folder that is saved from it.

        Raises `UnusableModel` or a `MaskError` for files that hold no model.
        """
        if not self.is_gguf:
            return fingerprint(self.path)
        from masquerade.gguf import read_checkpoint

        return fingerprint_tensors(read_checkpoint(self.path).weights)


def find_model(name: str) -> ModelFiles:
    """The files of a model; what is on the hub or in a registry is fetched first if it is not in the cache.

    Raises `UnusableModel` for what is neither a named model, nor a folder, nor a GGUF file, nor a model of the hub.
    """
    if name == demo.NAME:
        return ModelFiles(name, demo.MODEL)
    if name in PACKAGED:
        return ModelFiles(name, find_packaged(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFiles(path.resolve().name, _look_into(path.resolve()))
    if path.suffix == GGUF and path.is_file():
        return ModelFiles(path.stem, path.absolute())
    if path.exists():
        raise UnusableModel(
            f"the model {name!r} is a file; give the folder that holds config.json and *.safetensors, or a {GGUF} file"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix == GGUF:
        raise UnusableModel(
            f"the model {name!r} is not a folder or a {GGUF} file that is there, nor one of {_NAMES}, nor a hub id "
            "such as `owner/name`"
        )
    try:
        return ModelFiles(name, Path(snapshot_download(name, allow_patterns=_FILES)))
    except (OSError, HFValidationError) as error:
        raise UnusableModel(f"{name!r} is no local folder and could not be fetched from the hub: {error}") from error


def _look_into(folder: Path) -> Path:
    """The folder, or the one GGUF file in it if there are no safetensors."""
    found = sorted(folder.glob(f"*{GGUF}"))
    if not found or any(folder.glob("*.safetensors")):
        return folder
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UnusableModel(f"the folder {str(folder)!r} holds {len(found)} models, name one of them: {names:.300}")
    return found[0]
