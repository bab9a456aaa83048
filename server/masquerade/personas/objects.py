"""Objects of responses on the routes of personas, with an example of each."""

from __future__ import annotations

from typing import Any, Literal

from masquerade.http.certificates import CERTIFICATE_EXAMPLE, CertificateObject
from masquerade.http.wire import Schema, show


class RevisionObject(Schema):
    """A revision of a persona: the digest of its mask (`generation`), and its number."""

    generation: str
    number: int
    created_at: str


_PERSONA_EXAMPLE: dict[str, Any] = {
    "id": "gloomy",
    "object": "persona",
    "model": "demo:gloomy",
    "generation": "7d1f2a3b" * 8,
    "number": 2,
    "created_at": "2026-11-22T10:00:00+00:00",
    "gamma": 0.0,
    "phase": "decode",
    "aliases": [],
    "tags": ["npc"],
    "pinned": False,
    "bytes": 9216,
    "resident": True,
    "requests": 17,
    "served": True,
    "warning": None,
}


class PersonaObject(RevisionObject):
    """A persona: its current generation, defaults, size, residency and the number of requests that used it.

    `warning` says why its certificate does not hold on the quantised weights that this server has. It is then `served`
    only if the server accepts such personas.
    """

    model_config = show(_PERSONA_EXAMPLE)

    id: str
    object: Literal["persona"] = "persona"
    model: str
    gamma: float
    phase: Literal["all", "decode"]
    aliases: list[str]
    tags: list[str]
    pinned: bool
    bytes: int
    resident: bool
    requests: int
    served: bool
    warning: str | None


class SignatureObject(Schema):
    """The signature in a mask's file: the public key, what it covers, whether it is valid (null: it cannot be checked),
    and the label of the key if the server trusts it.
    """

    key: str
    covers: Literal["everything", "tensors"]
    valid: bool | None
    label: str | None


class MeasurementObject(Schema):
    """When this server measured a certificate, at which gamma and phase, on what (digests and counts), and how the base
    was quantised (null: not).
    """

    measured_at: str
    gamma: float
    phase: Literal["all", "decode"]
    data: dict[str, Any]
    quantization: str | None


class PersonaDetails(PersonaObject):
    """A persona with its notes, its history (the newest first), how it was built, its certificate and its signature.

    `certificate_source` is `measured` for a certificate of this server, and `claimed` for one that came with the file:
    then its `passed` is null, and the result that the file states is in `claimed`. It is null without a certificate.
    """

    model_config = show(
        _PERSONA_EXAMPLE
        | {
            "notes": "soft-spoken",
            "history": [{key: _PERSONA_EXAMPLE[key] for key in ("generation", "number", "created_at")}],
            "built": {"score": "attribution", "parameters": {"rho": 0.003}, "opposite": "cheerful"},
            "certificate": CERTIFICATE_EXAMPLE,
            "certificate_source": "measured",
            "measurement": {
                "measured_at": "2026-11-22T10:00:00+00:00",
                "gamma": 0.0,
                "phase": "decode",
                "data": {"examples": 256, "digest": "5c9e0f1a" * 8},
                "quantization": None,
            },
            "signature": None,
        }
    )

    notes: str
    history: list[RevisionObject]
    built: dict[str, Any]
    certificate: CertificateObject
    certificate_source: Literal["measured", "claimed"] | None
    measurement: MeasurementObject | None
    signature: SignatureObject | None


class PersonaList(Schema):
    """Personas by name."""

    object: Literal["list"] = "list"
    data: list[PersonaObject]


class OverlapObject(Schema):
    """Two masks over `size` weights: the numbers pruned by a, by b and by both; `jaccard` is both / either, and
    `differing` the share of the weights on which they disagree.
    """

    size: int
    a: int
    b: int
    both: int
    jaccard: float
    differing: float


_OVERLAP = {"size": 3145728, "a": 9437, "b": 9437, "both": 120, "jaccard": 0.0064, "differing": 0.0059}


class PersonaDiff(Schema):
    """Two revisions compared, by their digests: in total, by layer, by part (attention, mlp, other), by Linear."""

    model_config = show(
        {
            "object": "persona.diff",
            "a": "9f2c1a7b" * 8,
            "b": "04d3e8f1" * 8,
            "total": _OVERLAP,
            "layers": {"0": _OVERLAP},
            "parts": {"attention": _OVERLAP},
            "modules": {"model.layers.0.self_attn.o_proj": _OVERLAP},
        }
    )

    object: Literal["persona.diff"] = "persona.diff"
    a: str
    b: str
    total: OverlapObject
    layers: dict[str, OverlapObject]
    parts: dict[str, OverlapObject]
    modules: dict[str, OverlapObject]
