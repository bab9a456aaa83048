"""The parts of a GGUF file that llama.cpp's gguf-split wrote: their names, and one header of all their headers.

Their keys are those of llama.cpp's tools/gguf-split: `split.no` (from 0), `split.count` (0 in a file that was merged
again) and `split.tensors.count`, the tensors of all parts. Only the first part has the other metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from masquerade.errors import UnusableModel
from masquerade.gguf.file import GgufFile, GgufTensor, read_file

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class PartName:
    """What the name of a part says: `STEM-00002-of-00003.gguf`."""

    stem: str
    number: int  # from 1
    count: int

    @classmethod
    def parse(cls, path: Path) -> PartName | None:
        """The name of a part, or None for another file name."""
        found = _NAME.fullmatch(path.name)
        return cls(found["stem"], int(found["number"]), int(found["count"])) if found else None

    def __str__(self) -> str:
        return f"{self.stem}-{self.number:05d}-of-{self.count:05d}.gguf"


def read_parts(path: Path) -> GgufFile:
    """The header of a GGUF file, or of all parts if `path` is one of them. Each tensor says in which file it is.

    Raises `UnusableModel` that names the part if one is missing, or does not belong to the others.
    """
    given = read_file(path)
    count = given.size(_COUNT, 1, least=0)
    if count < 2:
        return given
    name = PartName.parse(path)
    if name is None or name.count != count:
        given.fail(
            _COUNT,
            f"is {count}; the name of a part must end in -0000N-of-{count:05d}.gguf, as llama-gguf-split writes it",
        )
    parts = [
        _read_part(path.with_name(str(replace(name, number=number))), number, given) for number in range(1, count + 1)
    ]
    return replace(parts[0], tensors=_join(parts))


def _read_part(path: Path, number: int, given: GgufFile) -> GgufFile:
    if not path.is_file():
        raise UnusableModel(f"{path}: is missing; {given.path.name} is one of {given.size(_COUNT)} parts of a model")
    part = read_file(path)
    if (found := part.size(_NUMBER, least=0) + 1) != number:
        part.fail(_NUMBER, f"says that this is part {found}, and its name that it is part {number}")
    for key in (_COUNT, _TENSORS):
        if (here := part.size(key)) != (there := given.size(key)):
            part.fail(key, f"is {here}, and {there} in {given.path.name}; these are parts of different files")
    return part


def _join(parts: list[GgufFile]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                part.fail(name, f"is in {tensors[name].path.name} too; these are parts of different files")
            tensors[name] = tensor
    if len(tensors) != (expected := parts[0].size(_TENSORS)):
        parts[0].fail(_TENSORS, f"is {expected}, and the {len(parts)} parts have {len(tensors)} tensors")
    return tensors
