"""The values that the client takes and returns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Required, TypedDict

from ._errors import UnexpectedAnswer

Message = Mapping[str, Any]
"""One message of a chat, as OpenAI writes it: `{"role": "user", "content": "Hello"}`."""

Prompt = str | Sequence[Message]
"""A chat so far, or a string for a chat of one user message."""


class ChatOptions(TypedDict, total=False):
    """Options of an answer. Those absent or None default to the persona's, then the server's."""

    model: str | None
    """Model id; `"demo:introvert"` also names the persona. Without it the client asks once for the base."""
    persona: str | None
    """Name of the persona; None is the base."""
    gamma: float | None
    """Share of the pruned weights that is kept: 0 is the full mask, 1 the base."""
    phase: Literal["all", "decode"] | None
    """Whether the mask applies from the first prompt token on, or only while decoding."""
    temperature: float | None
    """0 is greedy decoding."""
    top_p: float | None
    """Nucleus sampling: keep the likeliest tokens up to this probability mass."""
    top_k: int | None
    """Keep this many of the likeliest tokens."""
    seed: int | None
    """The same seed gives the same answer."""
    max_tokens: int | None
    """Maximum number of tokens of the answer."""
    min_tokens: int | None
    """Minimum number of tokens of the answer."""
    min_p: float | None
    """Keep tokens with at least this share of the highest probability."""
    repetition_penalty: float | None
    """Above 1, tokens that have occurred become less likely."""
    presence_penalty: float | None
    """Subtracted from the logit of a token that has occurred, as in OpenAI's API."""
    frequency_penalty: float | None
    """The same, once per occurrence."""
    logit_bias: Mapping[str, float] | None
    """Added to the logits of tokens, by id."""
    stop: str | Sequence[str] | None
    """Strings that end the answer; they are not part of it, unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None
    """Tokens that end the answer, beside the model's own."""
    include_stop_str_in_output: bool | None
    """Whether what ends the answer is part of its text."""
    ignore_eos: bool | None
    """Whether the answer goes on after the model's end token."""
    skip_special_tokens: bool | None
    """Whether the text leaves out special tokens; true by default."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the chat template, such as `{"enable_thinking": False}`."""
    continue_final_message: bool | None
    """Whether the answer continues the last message, which is the assistant's."""
    response_format: Mapping[str, Any] | None
    """`{"type": "json_object"}`, or a JSON schema, in OpenAI's format."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Usage:
        """Read a `usage` object."""
        return cls(int(data["prompt_tokens"]), int(data["completion_tokens"]), int(data["total_tokens"]))


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    text: str
    persona: str | None
    """None is the base."""
    generation: str | None
    """Digest of the applied mask."""
    finish_reason: str
    """`"stop"`: the answer is complete; `"length"`: it reached the maximum number of tokens."""
    usage: Usage
    model: str
    id: str
    reasoning: str = ""
    """The thoughts of a model that thinks before it answers; they are not part of the text."""

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
            reasoning=choice["message"].get("reasoning_content") or "",
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer."""

    text: str
    persona: str | None
    generation: str | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Model:
    """A model id: the base, or the base with a persona."""

    id: str
    parent: str | None
    """The base of this persona; None for a base."""

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
    """One version of a persona's mask."""

    digest: str
    number: int
    created_at: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        """Read an entry of a persona's history."""
        return cls(data["generation"], int(data["number"]), data["created_at"])


class CurvePoint(TypedDict, total=False):
    """A mask at one gamma. A figure that was not measured is absent or None."""

    gamma: Required[float]
    margin_shift_median: float | None
    """Median shift, nats a token."""
    own_ratio: float | None
    """Perplexity of the persona's text over the base's."""
    neutral_ratio: float | None
    """Perplexity of neutral text over the base's."""
    facts_kept: float | None
    """Of the facts that the base knows, the share kept."""


class FactsKept(TypedDict):
    """How many facts were asked (`of`), how many the base knows, and the share of those that the mask keeps."""

    of: int
    known: int
    kept: float | None


class LoopShares(TypedDict):
    """The shares of greedy answers that repeat themselves, with the mask and without, and the number of answers."""

    masked: float
    base: float
    of: int


class Certificate(TypedDict, total=False):
    """Measured effects of a mask; a mapping at run time, with other keys too.

    A figure that was not measured, or that the server's version does not know, is absent.
    """

    verdict: str | None
    passed: bool | None
    """If the certificate is claimed, None, and the maker's value is in `claimed`."""
    claimed: Mapping[str, Any]
    margin_shift: float | None
    """Mean shift of the margin, nats a token."""
    margin_shift_median: float | None
    flip: float | None
    """Share of prompts that flip."""
    own_ratio: float | None
    neutral_ratio: float | None
    kl: float | None
    pairs: int
    preferred: Mapping[str, float]
    intervals: Mapping[str, Sequence[float | None]]
    curve: Sequence[CurvePoint]
    """Dose-response curve, over gamma."""
    facts: FactsKept
    loops: LoopShares
    changed_answers: Mapping[str, Any]
    phases: Mapping[str, Any]
    choice: Mapping[str, Any]
    reasons: Sequence[str]
    remarks: Sequence[str]


@dataclass(frozen=True, slots=True)
class Persona:
    """A persona of the server. Fields with defaults are filled by `personas.get`, not in a list."""

    name: str
    current: Generation
    model: str
    """Model id of the persona, such as `"demo:formal"`."""
    gamma: float
    phase: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    pinned: bool
    bytes: int
    resident: bool
    """Whether its mask is on the device."""
    requests: int
    """Requests with this persona since the server started."""
    served: bool = True
    """False if the server's base is quantised and the persona was not measured there."""
    warning: str | None = None
    """Why its certificate does not hold on this server's base."""
    notes: str = ""
    history: tuple[Generation, ...] = ()
    built: Mapping[str, Any] = field(default_factory=dict)
    """Score, parameters and calibration data."""
    certificate: Certificate = field(default_factory=Certificate)
    """Measured effects of the mask; empty without a certificate."""
    certificate_source: str | None = None
    """`"measured"` by this server, or `"claimed"` by the author of the mask; None without a certificate."""
    signature: Mapping[str, Any] | None = None
    """Key, what it covers (`"everything"` or `"tensors"`), whether it is valid, and the label of a trusted key."""

    @property
    def generation(self) -> str:
        """Digest of the current mask, as `expected` takes it."""
        return self.current.digest

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Persona:
        """Read a `persona` object."""
        other = {
            "name": data["id"],
            "current": Generation.from_json(data),
            "aliases": tuple(data["aliases"]),
            "tags": tuple(data["tags"]),
            "history": tuple(Generation.from_json(one) for one in data.get("history", ())),
        }
        return cls(**_same_names(cls, data) | other)


class PersonaChanges(TypedDict, total=False):
    """Fields of a persona to set. Those absent, and notes and tags of None, stay as they are."""

    gamma: float | None
    """Default gamma; None is the mask's own."""
    notes: str | None
    tags: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two masks over the same weights: the numbers of weights that each prunes, and both."""

    size: int
    a: int
    b: int
    both: int
    jaccard: float
    """Jaccard index of the pruned weights."""
    differing: float
    """Share of weights that only one of them prunes."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Overlap:
        """Read one entry of a `persona.diff` object."""
        return cls(**_same_names(cls, data))


@dataclass(frozen=True, slots=True)
class Diff:
    """The difference of two personas: in total, by layer, by part (`attention`, `mlp`), by Linear."""

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
    """Options of a build. Those absent have the server's defaults."""

    contrast: Data
    """Examples of the opposite."""
    contrast_name: str
    """Publish the opposite too, under this name."""
    neutral: Data
    """Examples that no persona should change."""
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
    structure: Literal["weights", "channels"]
    """What the mask prunes: single weights, or whole input channels, so that it can be exported as a LoRA."""
    gamma: float
    phase: Literal["all", "decode"]
    strength: Literal["gentle", "normal", "strong"]
    """What the mask may cost: 1.02, 1.05 or 1.15 times the perplexity of neutral text."""
    neutral_budget: float
    """This ratio instead of the strength's."""
    own_budget: float
    """The same for the persona's own text."""
    samples: int
    """Maximum number of examples."""
    seed: int
    force: bool
    """Publish a mask that fails the checks, marked as such."""
    replace: bool
    """Make a new generation of an existing persona."""


@dataclass(frozen=True, slots=True)
class Made:
    """A persona that a build published."""

    persona: str
    generation: str
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Build:
    """The state of a build."""

    id: str
    persona: str
    """The requested name, or one that the server chose; `made` has the published personas."""
    status: str
    """`validating_files`, `queued`, `running`; then `succeeded`, `failed` or `cancelled`."""
    created_at: int
    finished_at: int | None
    made: tuple[Made, ...]
    error: str | None

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ("succeeded", "failed", "cancelled")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Build:
        """Read a `fine_tuning.job` object."""
        made = (Made(one["persona"], one["digest"], one["certificate"]) for one in data["personas"])
        error = data["error"]
        other = {"made": tuple(made), "error": error["message"] if error else None}
        return cls(**_same_names(cls, data) | other)


@dataclass(frozen=True, slots=True)
class BuildEvent:
    """An event of a build. `stage` is set, and `done` and `total` count, if it reports progress."""

    id: str
    created_at: int
    level: str
    message: str
    stage: str | None
    done: int
    total: int | None
    """None if unknown."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildEvent:
        """Read a `fine_tuning.job.event` object."""
        progress = data.get("data") or {}
        counts = {"done": progress.get("step", 0), "total": progress.get("total_steps") or None}
        return cls(**_same_names(cls, data) | {"stage": progress.get("stage")} | counts)


def _same_names(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an object that have the names of a dataclass's fields."""
    return {item.name: data[item.name] for item in fields(kind) if item.name in data}


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Translate decoding errors to `UnexpectedAnswer`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnexpectedAnswer(f"this is not {what}: {error!r}") from error
