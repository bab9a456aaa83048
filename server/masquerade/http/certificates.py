"""Wire objects of certificates: what a mask was measured to do.

A key that was not measured, or that an older version does not write, is absent; keys that are not listed are kept.
"""

from __future__ import annotations

from typing import Any, Required

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic refuses the standard library's before Python 3.12

_OPEN = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


@with_config(_OPEN)
class CurvePointObject(TypedDict, total=False):
    """The mask at a gamma: median shift in nats a token, perplexities over the base's, and the share of known facts
    that are kept.
    """

    gamma: Required[float]
    margin_shift_median: float | None
    own_ratio: float | None
    neutral_ratio: float | None
    facts_kept: float | None


@with_config(_OPEN)
class FactsObject(TypedDict):
    """Of the facts that were asked (`of`), how many the base knows, and the share of those that the mask keeps."""

    of: int
    known: int
    kept: float | None


@with_config(_OPEN)
class LoopsObject(TypedDict):
    """The shares of greedy answers that repeat themselves, with the mask and without, and the number of answers."""

    masked: float
    base: float
    of: int


@with_config(_OPEN)
class CertificateObject(TypedDict, total=False):
    """Figures at the default gamma and phase, with 95 % intervals, and the `curve` over gamma.

    `quantization` is that of the base that they were measured on; absent, its weights were as in its files. In a
    claimed certificate, `passed` and `verdict` are null.
    """

    verdict: str | None
    passed: bool | None
    margin_shift: float | None
    margin_shift_median: float | None
    flip: float | None
    own_ratio: float | None
    neutral_ratio: float | None
    kl: float | None
    pairs: int
    intervals: dict[str, list[float | None]]
    curve: list[CurvePointObject]
    facts: FactsObject
    loops: LoopsObject
    quantization: str | None


CERTIFICATE_EXAMPLE: dict[str, Any] = {
    "verdict": "passed",
    "passed": True,
    "margin_shift_median": 0.52,
    "neutral_ratio": 1.04,
    "curve": [{"gamma": 0.5, "margin_shift_median": 0.26, "own_ratio": 0.97, "neutral_ratio": 1.01, "facts_kept": 1.0}],
    "facts": {"of": 100, "known": 41, "kept": 0.98},
    "loops": {"masked": 0.0, "base": 0.0, "of": 16},
}
