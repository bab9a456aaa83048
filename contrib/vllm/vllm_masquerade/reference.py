"""Personas by name: from `persona@digest:gamma:phase` to the mask of a store, and to a LoRARequest of vLLM."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Self, get_args

from vllm.lora.request import LoRARequest

from maskstore import InvalidMaskValue, InvalidName, Registry
from maskstore.mask import Phase

STORE = "MASQUERADE_STORE"
_SCHEME = "masquerade:"
_PATH = re.compile(rf"{_SCHEME}([0-9a-f]{{64}}):([^:\s]+):(all|decode)")
_numbers = count(1)


class NotConfigured(Exception):
    """The environment lacks what the plugin needs."""


@dataclass(frozen=True)
class Reference:
    """A mask by its digest, at a gamma, in a phase."""

    digest: str
    gamma: float
    phase: Phase

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise InvalidMaskValue(f"gamma is {self.gamma}; it must lie in [0, 1]")

    @property
    def path(self) -> str:
        """What vLLM has as the adapter's path, which is part of the hash of a KV cache block."""
        return f"{_SCHEME}{self.digest}:{self.gamma!r}:{self.phase}"

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """The reference of a path; None if the path is that of something else, such as a LoRA."""
        found = _PATH.fullmatch(path)
        return cls(found[1], _parse_gamma(found[2]), _parse_phase(found[3])) if found else None

    @classmethod
    def find(cls, registry: Registry, name: str) -> Self:
        """What `persona`, `persona@digest` or one of them with `:gamma`, `:phase` or `:gamma:phase` means at present.

        A digest has 8 or more digits. A gamma that is not given is the persona's own, else the revision's, else the
        mask's; so is the phase. Raises the errors of maskstore.
        """
        reference, *options = name.split(":")
        revision = registry.resolve(reference)
        gamma, phase = revision.defaults(registry.store.summary(revision.digest).info)
        own = registry.describe(revision.name).gamma
        gamma = gamma if own is None else own
        if options and options[-1] in get_args(Phase):
            phase = _parse_phase(options.pop())
        if options:
            gamma = _parse_gamma(options.pop())
        if options:
            raise InvalidName(f"{name!r:.120} is not persona@digest:gamma:phase")
        return cls(revision.digest, float(gamma), phase)


def find_store() -> Path:
    """The folder of the store. Raises `NotConfigured`."""
    if not (root := os.environ.get(STORE)):
        raise NotConfigured(f"{STORE} is not set; it names the folder of a store of masks")
    if not (Path(root) / "registry.sqlite").is_file():
        raise NotConfigured(f"{STORE} is {root}, which has no registry.sqlite and so is no store of masks")
    return Path(root)


def make_request(name: str) -> LoRARequest:
    """The request of a persona for `LLM.generate(..., lora_request=)`, from the store in `MASQUERADE_STORE`."""
    return _number(name, Reference.find(Registry(find_store()), name).path)


@cache
def _number(name: str, path: str) -> LoRARequest:
    """vLLM knows an adapter by its number alone, so equal ones keep theirs."""
    return LoRARequest(name, next(_numbers), path)


def _parse_gamma(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidMaskValue(f"{text!r:.40} is not a gamma") from None


def _parse_phase(text: str) -> Phase:
    return "decode" if text == "decode" else "all"
