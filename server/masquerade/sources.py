"""Where a base model's files are: with the package, in a folder, or on the hub.

Knows names of models. Refuses to read a model, and so needs no torch.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from masquerade import demo
from masquerade.errors import UnusableModel

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def find_folder(name: str) -> Path:
    """The local folder of a model's files; a hub id is downloaded (or found in the hub's cache) first.

    Raises `UnusableModel` for what is neither `demo`, nor a folder, nor a model of the hub.
    """
    if name == demo.NAME:
        return demo.MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UnusableModel(f"the model {name!r} is a file; give the folder that holds config.json and *.safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UnusableModel(f"the model {name!r} is not a folder, nor `demo`, nor a hub id such as `owner/name`")
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (OSError, HFValidationError) as error:
        raise UnusableModel(f"{name!r} is no local folder and could not be fetched from the hub: {error}") from error


def name_model(name: str) -> str:
    """What a model is called in the API: a folder by its last part, everything else as it was asked for."""
    path = Path(name).expanduser()
    return path.resolve().name if name != demo.NAME and path.is_dir() else name
