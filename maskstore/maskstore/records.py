"""Records of a registry: personas, their revisions, certificates and measurements."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

from maskstore.mask import MaskInfo, Phase


class Anything(Enum):
    """The type of ANY: publish over whatever is current."""

    ANY = "any"


ANY: Final = Anything.ANY


@dataclass(frozen=True)
class Revision:
    """One published version of a persona; `number` counts from 1 and is never reused.

    `gamma` and `phase` are the defaults it was published with. They take precedence over those in the mask's file,
    which equal masks share. None means the file's.
    """

    name: str
    digest: str
    number: int
    created_at: str
    gamma: float | None = None
    phase: Phase | None = None

    def defaults(self, info: MaskInfo) -> tuple[float, Phase]:
        """Gamma and phase of requests that do not set them; `info` is the mask's."""
        return info.gamma if self.gamma is None else self.gamma, self.phase or info.phase


@dataclass(frozen=True)
class Persona:
    """A name and all that the registry records about it; `gamma`, unless None, overrides that of every revision."""

    name: str
    current: Revision
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    gamma: float | None
    notes: str
    pinned: bool


@dataclass(frozen=True)
class Measurement:
    """A certificate that this store's own server or commands measured; a file cannot claim one.

    It holds for a digest, which identifies base and tensors, applied at `gamma` and, unless it says otherwise, in
    `phase`, to weights that are quantised by `quantization`; None are those of the base's files as they are. `data`
    identifies what it was measured on, by digests and counts.
    """

    digest: str
    certificate: Mapping[str, Any]
    gamma: float
    phase: Phase
    data: Mapping[str, Any]
    measured_at: str
    quantization: str | None = None


@dataclass(frozen=True)
class Certificate:
    """What is known about the effect of a mask. `source` is None if there is no certificate.

    A claimed certificate is only the word of the mask's maker: its `passed` and `verdict` are None, and the maker's
    values of both are in `figures["claimed"]`.
    """

    figures: Mapping[str, Any]
    source: Literal["measured", "claimed"] | None
    measurement: Measurement | None = None
