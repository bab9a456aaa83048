"""What goes in and what comes out, as plain values.

Knows the shapes of requests and answers. Refuses to know how they travel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from ._errors import UnexpectedAnswer

Message = Mapping[str, Any]
"""One message of a chat, as OpenAI writes it: `{"role": "user", "content": "Hello"}`."""

Prompt = str | Sequence[Message]
"""A chat so far, or a string for a chat of one user message."""


class ChatOptions(TypedDict, total=False):
    """How to answer. What is absent or None is left to the server, and to the persona's own defaults."""

    model: str | None
    """Model id; `"demo:introvert"` also names the persona. Without it the client asks once for the base."""
    persona: str | None
    """Persona to wear; none is the unmasked base."""
    gamma: float | None
    """0 wears the mask fully, 1 is the base."""
    phase: Literal["all", "decode"] | None
    """Whether the mask is worn from the first token of the prompt on, or only while answering."""
    temperature: float | None
    """0 always takes the likeliest token."""
    top_p: float | None
    """Keep the likeliest tokens up to this share of the probability."""
    top_k: int | None
    """Keep this many of the likeliest tokens."""
    seed: int | None
    """The same seed gives the same answer."""
    max_tokens: int | None
    """Break the answer off after this many tokens."""
    min_tokens: int | None
    """Do not let it end before so many."""
    min_p: float | None
    """Keep the tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: float | None
    """Above 1, what has been said is less likely to be said again."""
    presence_penalty: float | None
    """OpenAI's: taken from the logit of a token that has been said."""
    frequency_penalty: float | None
    """OpenAI's: taken once for each time."""
    logit_bias: Mapping[str, float] | None
    """Added to the logits of tokens, by id."""
    stop: str | Sequence[str] | None
    """Texts that end the answer, and are not part of it."""
    response_format: Mapping[str, Any] | None
    """`{"type": "json_object"}`, or a JSON schema, as OpenAI writes it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Usage:
        """Read a `usage` object."""
        return cls(int(data["prompt_tokens"]), int(data["completion_tokens"]), int(data["total_tokens"]))


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer, who gave it and why it ended."""

    text: str
    persona: str | None
    """None is the unmasked base."""
    generation: str | None
    """Digest of the mask that was worn."""
    finish_reason: str
    """`"stop"`: the model was done; `"length"`: it ran out of tokens."""
    usage: Usage
    model: str
    id: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reply:
        """Read a `chat.completion` object."""
        choice = data["choices"][0]
        return cls(
            text=choice["message"]["content"] or "",
            persona=data.get("persona"),
            generation=data.get("generation"),
            finish_reason=choice["finish_reason"],
            usage=Usage.from_json(data["usage"]),
            model=data["model"],
            id=data["id"],
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer that is being given, and who gives it."""

    text: str
    persona: str | None
    generation: str | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Model:
    """Something that `model` can name: a base, or one of its personas."""

    id: str
    parent: str | None
    """The base that wears this persona; None for a base."""

    @property
    def persona(self) -> str | None:
        """The persona's name; None for a base."""
        return None if self.parent is None else self.id.removeprefix(f"{self.parent}:")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Model:
        """Read a `model` object."""
        return cls(id=data["id"], parent=data.get("parent"))


@dataclass(frozen=True, slots=True)
class Generation:
    """One of the masks that a persona has had."""

    digest: str
    number: int
    created_at: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        """Read an entry of a persona's history."""
        return cls(data["generation"], int(data["number"]), data["created_at"])


@dataclass(frozen=True, slots=True)
class Persona:
    """A persona as the server keeps it. What stands below `requests` is empty in a list; `personas.get` fills it."""

    name: str
    current: Generation
    model: str
    """Names it where a model is wanted: `"demo:formal"`."""
    gamma: float
    phase: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    pinned: bool
    bytes: int
    resident: bool
    """Whether its mask is on the device."""
    requests: int
    """How many wore it since the server started."""
    notes: str = ""
    history: tuple[Generation, ...] = ()
    built: Mapping[str, Any] = field(default_factory=dict)
    """Score, parameters and calibration data."""
    certificate: Mapping[str, Any] = field(default_factory=dict)
    """What its mask does. Of a claimed one `passed` is None; what its maker says is in `certificate["claimed"]`."""
    certificate_source: str | None = None
    """`"measured"` by this server, or `"claimed"` by whoever made the mask; None if there is no certificate."""
    signature: Mapping[str, Any] | None = None
    """Key, what it covers (`"everything"` or `"tensors"`), whether it is valid, and the label of a trusted key."""

    @property
    def generation(self) -> str:
        """Digest of the current mask; what `expected` takes."""
        return self.current.digest

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Persona:
        """Read a `persona` object."""
        return cls(
            name=data["id"],
            current=Generation.from_json(data),
            model=data["model"],
            gamma=data["gamma"],
            phase=data["phase"],
            aliases=tuple(data["aliases"]),
            tags=tuple(data["tags"]),
            pinned=data["pinned"],
            bytes=data["bytes"],
            resident=data["resident"],
            requests=data["requests"],
            notes=data.get("notes", ""),
            history=tuple(Generation.from_json(one) for one in data.get("history", ())),
            built=data.get("built", {}),
            certificate=data.get("certificate", {}),
            certificate_source=data.get("certificate_source"),
            signature=data.get("signature"),
        )


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two masks over some weights: how many each prunes, and how many both."""

    size: int
    a: int
    b: int
    both: int
    jaccard: float
    """Share pruned by both, of what either prunes."""
    differing: float
    """Share of weights that only one of them prunes."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Overlap:
        """Read one entry of a `persona.diff` object."""
        return cls(data["size"], data["a"], data["b"], data["both"], data["jaccard"], data["differing"])


@dataclass(frozen=True, slots=True)
class Diff:
    """How two personas differ: in all, by layer, by part (`attention`, `mlp`), by Linear."""

    total: Overlap
    layers: Mapping[str, Overlap]
    parts: Mapping[str, Overlap]
    modules: Mapping[str, Overlap]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Diff:
        """Read a `persona.diff` object."""
        named = {
            key: {name: Overlap.from_json(one) for name, one in data[key].items()}
            for key in ("layers", "parts", "modules")
        }
        return cls(Overlap.from_json(data["total"]), **named)


Data = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""Examples: the path of a JSONL file, or the objects of its lines."""


class BuildOptions(TypedDict, total=False):
    """How to build. What is absent is the server's default."""

    contrast: Data
    """How the opposite talks."""
    contrast_name: str
    """Publish the opposite too, under this name."""
    neutral: Data
    """What every persona should go on knowing."""
    validation: Data
    """Held-out examples; without them some of the examples are held out."""
    contrast_validation: Data
    system_prompt: str
    """The base answers the questions in the data under this prompt, and the answers become the examples."""
    contrast_prompt: str
    card: str | os.PathLike[str]
    """A character card, JSON or PNG, in place of a system prompt."""
    score: str
    rho: float | Literal["auto"]
    group: Literal["row", "layer"]
    scope: Literal["all", "mlp", "attention", "outputs"]
    gamma: float
    phase: Literal["all", "decode"]
    samples: int
    """Use at most so many examples."""
    seed: int
    force: bool
    """Publish even a mask that does nothing, or ruins the model, marked as such."""
    replace: bool
    """Make a new generation of a persona that exists."""


@dataclass(frozen=True, slots=True)
class Made:
    """A persona that a build has made."""

    persona: str
    generation: str
    certificate: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Build:
    """A build as it is now."""

    id: str
    persona: str
    """The name that was asked for, or that the server made; `made` says whether it has come to that."""
    status: str
    """`validating_files`, `queued`, `running`; then `succeeded`, `failed` or `cancelled`."""
    created_at: int
    finished_at: int | None
    made: tuple[Made, ...]
    error: str | None

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("succeeded", "failed", "cancelled")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Build:
        """Read a `fine_tuning.job` object."""
        made = (Made(one["persona"], one["digest"], one["certificate"]) for one in data["personas"])
        error = data["error"]
        return cls(
            id=data["id"],
            persona=data["persona"],
            status=data["status"],
            created_at=data["created_at"],
            finished_at=data["finished_at"],
            made=tuple(made),
            error=error["message"] if error else None,
        )


@dataclass(frozen=True, slots=True)
class BuildEvent:
    """Something that happened in a build. `stage`, `done` and `total` are there where it is about progress."""

    id: str
    created_at: int
    level: str
    message: str
    stage: str | None
    done: int
    total: int | None
    """None where it cannot be known."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildEvent:
        """Read a `fine_tuning.job.event` object."""
        progress = data.get("data") or {}
        return cls(
            id=data["id"],
            created_at=data["created_at"],
            level=data["level"],
            message=data["message"],
            stage=progress.get("stage"),
            done=progress.get("step", 0),
            total=progress.get("total_steps") or None,
        )


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Whatever goes wrong inside means that the answer is not of this API."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnexpectedAnswer(f"this is not {what}: {error!r}") from error
