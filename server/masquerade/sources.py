"""Finds the files of a base model: in the package, a folder or file, Ollama's store, a registry, the hub. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from maskstore import fingerprint, fingerprint_tensors
from masquerade import demo
from masquerade.errors import UnusableModel
from masquerade.ollama import PREFIX, find_ollama
from masquerade.packaged import PACKAGED, find_packaged

if TYPE_CHECKING:
    from masquerade.gguf import Checkpoint

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
_NAMES = ", ".join(f"`{name}`" for name in (demo.NAME, *PACKAGED))
GGUF = ".gguf"
_MAGIC = b"GGUF"  # of a file without the suffix, such as a blob of Ollama's store


@dataclass(frozen=True)
class ModelFiles:
    """The files of a base model."""

    name: str  # the default id in the API
    path: Path  # a folder of `save_pretrained`, or a GGUF file, or any part of one

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one GGUF file."""
        return self.path.is_file()

    def fingerprint(self) -> str:
        """The fingerprint that masks refer to, the same for a GGUF file and for the folder that is saved from it.

        Raises `UnusableModel` or a `MaskError` for files without a model.
        """
        return fingerprint_tensors(self.checkpoint.weights) if self.is_gguf else fingerprint(self.path)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The header of a GGUF file, read once. Raises `UnusableModel`."""
        from masquerade.gguf import read_checkpoint

        return read_checkpoint(self.path)


def find_model(name: str, *, download: bool = True) -> ModelFiles:
    """The files of a model, given as a name, folder, GGUF file, name in Ollama's store or hub id.

    Downloads hub and registry models once; without `download`, a hub model's files are those that the cache has, which
    may be its config alone. Raises `UnusableModel` if there is no such model, or if it is not there to be read.
    """
    if not name:
        raise UnusableModel(f"the model is ''; give one of {_NAMES}, a folder, a {GGUF} file or a hub id")
    if name == demo.NAME:
        return ModelFiles(name, demo.MODEL)
    if name in PACKAGED:
        return ModelFiles(name, find_packaged(name, download=download))
    if name.startswith(PREFIX):
        return ModelFiles(*find_ollama(name.removeprefix(PREFIX)))
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFiles(path.resolve().name, _find_in_folder(path.resolve()))
    if path.is_file() and (path.suffix == GGUF or _begins_as_gguf(path)):
        return ModelFiles(_name_file(path), path.absolute())
    if path.exists():
        raise UnusableModel(
            f"the model {name!r} is a file; give the folder that holds config.json and *.safetensors, or a file in GGUF"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix == GGUF:
        raise UnusableModel(
            f"the model {name!r} is not an existing folder or {GGUF} file, nor one of {_NAMES}, nor a hub id such as "
            "`owner/name`"
        )
    from huggingface_hub import snapshot_download  # with its HTTP client, which no other model needs
    from huggingface_hub.errors import HFValidationError

    try:
        return ModelFiles(name, Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=not download)))
    except (OSError, HFValidationError) as error:
        if not download and isinstance(error, OSError):
            raise UnusableModel(
                f"{name!r} is neither a local folder nor in the hub's cache, and nothing is downloaded here; "
                f"`hf download {name} config.json` gets its header, which is enough"
            ) from error
        raise UnusableModel(f"{name!r} is not a local folder and could not be downloaded: {error}") from error


def locate_model(name: str, folder: Path) -> str:
    """The name of a model for a process with another working folder: the path of one in `folder` is absolute."""
    path = (folder / name).absolute()
    known = name == demo.NAME or name in PACKAGED or name.startswith(PREFIX)
    return name if known or not path.exists() else str(path)


def _find_in_folder(folder: Path) -> Path:
    """The folder, or the file or first part of its only GGUF if it has no safetensors."""
    found = sorted(folder.glob(f"*{GGUF}"))
    if not found or any(folder.glob("*.safetensors")):
        return folder
    models = {_name_file(path): path for path in reversed(found)}
    if len(models) > 1:
        names = ", ".join(sorted(path.name for path in models.values()))
        raise UnusableModel(f"the folder {str(folder)!r} holds {len(models)} models; name one of them: {names:.300}")
    return found[0]


def _begins_as_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise UnusableModel(f"the model {str(path)!r} cannot be read: {error}") from error


def _name_file(path: Path) -> str:
    """The name of a GGUF file without `.gguf`, nor the number of a part."""
    from masquerade.gguf import PartName

    name = PartName.parse(path)
    return name.stem if name else path.name.removesuffix(GGUF)
