"""Keeps what the base itself writes to built-in questions in the user's cache, for all builds on that base."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from masquerade import __version__
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import Items
from masquerade.kernels.native import find_library
from masquerade.model import Base
from masquerade.packaged import find_cache

FOLDER = Path("masquerade", "answers")
# changes with what the same model answers: 2 reads more than 64 positions and draws tokens otherwise, 3 whole windows,
# 4 as many tokens as a row's own context has room for
REVISION = 4
VERSIONS = __version__, torch.__version__, transformers.__version__  # what a computed result may depend on
_log = logging.getLogger("masquerade")


def recall_answers(base: Base, prompts: Sequence[Encoded], params: GenerationParams) -> Items[list[str]]:
    """The base's own texts, as `write_answers` has them; a work item is a pass of the model, or reads them.

    What is kept depends on all that the texts depend on: weights and their form, prompts, parameters, versions and the
    instructions of the kernels. A file that cannot be read is written anew; one that cannot be written is a warning.
    """
    path = find_cache() / FOLDER / f"{_identify(base, prompts, params)}.json"
    texts = _read(path, len(prompts))
    if texts is None:
        texts = yield from write_answers(base, prompts, params=params)
        _write(path, texts)
    yield
    return texts


def _identify(base: Base, prompts: Sequence[Encoded], params: GenerationParams) -> str:
    library = find_library()
    versions = REVISION, *VERSIONS, library and library.isas[-1]
    weights = base.fingerprint, str(base.dtype), base.quantization, base.device.type, sorted(base.ends)
    asked = asdict(params), [list(prompt.prompt) for prompt in prompts]
    return hashlib.sha256(json.dumps((versions, weights, asked)).encode()).hexdigest()


def _read(path: Path, count: int) -> list[str] | None:
    try:
        texts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(texts, list) and len(texts) == count and all(isinstance(text, str) for text in texts)
    return texts if whole else None


def _write(path: Path, texts: Sequence[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as part:
            json.dump(texts, part)
        os.replace(part.name, path)
    except OSError as error:
        _log.warning("the base's answers cannot be kept for the next build: %s: %s", path.parent, error.strerror)
