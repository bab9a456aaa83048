"""A request as the engine sees it: token ids in, a persona to wear, events out.

Knows the progress of one request. Refuses to know about other requests and models.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from masquerade.engine.prefix import BLOCK_SIZE, PrefixHashes, Salts
from masquerade.engine.text import AnswerText
from masquerade.errors import InvalidValue, MasqueradeError
from masquerade.model import AppliedMask, Span

_log = logging.getLogger(__name__)

Phase = Literal["all", "decode"]
Reason = Literal["stop", "length", "cancelled", "error"]

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Raises `InvalidValue` outside of the stated ranges.

    The model's logits are changed in this order: repetition penalty, presence and frequency penalty, bias; then
    temperature, top_k, top_p over the renormalised rest, min_p.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # >= 0; 0 is off
    seed: int | None = None
    min_p: float = 0.0  # [0, 1]: least probability, as a share of the best token's
    repetition_penalty: float = 1.0  # > 0: divides positive logits of tokens seen in prompt or answer, times negative
    presence_penalty: float = 0.0  # [-2, 2]: taken from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # [-2, 2]: the same, times how often
    bias: Mapping[int, float] = field(default_factory=dict)  # token id -> [-100, 100], added to its logit
    logprobs: int | None = None  # 0 to 20: report each token's log probability, and so many of the likeliest

    def __post_init__(self) -> None:
        for name, least, most, words in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:  # false of nan, too
                raise InvalidValue(f"{name} is {value}; it must be {words}", param=name)
        for token, bias in self.bias.items():
            if not -100 <= bias <= 100:
                raise InvalidValue(
                    f"logit_bias of token {token} is {bias}; it must be between -100 and 100", param="logit_bias"
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InvalidValue(
                f"top_logprobs is {self.logprobs}; it must be between 0 and {MOST_LOGPROBS}", param="top_logprobs"
            )

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


_TINY, _HUGE = math.ulp(0.0), math.nextafter(math.inf, 0)  # the least and the most that a float can be
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("temperature", 0, _HUGE, "at least 0"),
    ("top_p", _TINY, 1, "above 0 and at most 1"),
    ("top_k", 0, math.inf, "at least 0 (0 is off)"),
    ("min_p", 0, 1, "between 0 and 1"),
    ("repetition_penalty", _TINY, _HUGE, "above 0"),
    ("presence_penalty", -2, 2, "between -2 and 2"),
    ("frequency_penalty", -2, 2, "between -2 and 2"),
)


class Token(NamedTuple):
    """One more token of the answer, and the text that it made certain."""

    id: int
    text: str = ""
    logprob: float | None = None  # of the model's own distribution, before penalties and temperature
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their log probabilities


@dataclass(frozen=True)
class Finished:
    """The last event of every request, with the text that was held back until now."""

    reason: Reason
    error: MasqueradeError | None = None
    text: str = ""


Event = Token | Finished


class Grammar(Protocol):
    """What may come next. One object serves one answer."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""

    def allow(self, row: Tensor) -> None:
        """Set the logits [vocabulary] of what may not come next to minus infinity, in place."""

    def accept(self, token: int) -> None:
        """Advance by a token that was allowed."""


@dataclass(eq=False)
class Request:
    """One answer to produce. `emit` is called on the engine's thread and must return at once.

    In phase `all` every position wears the mask; in phase `decode` those from the last prompt token on, so that the
    prompt's keys and values are the base's.
    """

    prompt: list[int]
    max_tokens: int
    emit: Callable[[Event], None]
    applied: AppliedMask | None = None
    phase: Phase = "all"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ends: frozenset[int] = frozenset()
    min_tokens: int = 0  # before so many, nothing ends the answer
    text: AnswerText | None = None  # makes text of the tokens and looks for stop strings
    grammar: Grammar | None = None
    owner: str = ""  # whom the work is charged to
    priority: int = 0  # higher goes first

    cancelled: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    arrival: int = field(default=0, init=False)  # the engine's count of requests
    started: bool = field(default=False, init=False)  # was admitted once
    cached: int = field(default=0, init=False)  # prompt positions that needed no computing
    done: int = field(default=0, init=False)  # positions whose keys and values are in the cache
    pages: list[int] = field(default_factory=list, init=False)
    published: int = field(default=0, init=False)  # pages that others can find
    charged: int = field(default=0, init=False)  # tokens of the answer that its accounts know of
    seat: int = field(default=-1, init=False)  # row of the block table

    def __post_init__(self) -> None:
        self.reach = len(self.prompt) + self.max_tokens  # the most positions it can ever need in the cache
        self.ids = list(self.prompt)  # prompt and answer so far
        self.account = self.owner, self.applied.mask.digest if self.applied else None  # what its work is entered into
        seed = self.sampling.seed
        self._seed = str(secrets.randbits(128) if seed is None else seed).encode()

    @property
    def pending(self) -> int:
        """Known tokens that have not been through the model."""
        return len(self.ids) - self.done

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.prompt)

    @property
    def first_masked(self) -> int:
        """The first position that wears the mask; beyond every position without one."""
        if self.applied is None:
            return self.reach
        return 0 if self.phase == "all" else len(self.prompt) - 1

    def link(self, salts: Salts) -> None:
        """Prepare the names of this request's pages."""
        self._chain = PrefixHashes(salts.of(None), salts.of(self.applied), self.first_masked)

    def keys(self, count: int) -> list[bytes]:
        """The names of its first pages, all of whose tokens are known."""
        return self._chain.keys(self.ids, count)

    def lose(self) -> None:
        """Forget what is in the cache."""
        self.pages.clear()
        self.done = self.published = 0
        self.seat = -1

    @property
    def tail(self) -> int:
        """Positions of the prompt, before its last, in the page of its last."""
        return (len(self.prompt) - 1) % BLOCK_SIZE

    def tail_key(self) -> bytes:
        """What the tail is found under."""
        return self._chain.tail(self.ids, len(self.prompt) - 1)

    def draw(self) -> float:
        """A number in [0, 1) that the seed and the place in the answer decide: neighbours, retries and preemption
        change nothing.
        """
        digest = blake2b(b"%s/%d" % (self._seed, self.answered), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def masked_spans(self, start: int, stop: int, row: int) -> list[Span]:
        """Which of the positions [start, stop), packed from `row` on, wear the mask."""
        first = max(start, self.first_masked)
        if self.applied is None or first >= stop:
            return []
        return [Span(self.applied, row + first - start, row + stop - start)]

    def accept(
        self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()
    ) -> Reason | None:
        """Append a sampled token; a token that ends the answer is not part of it."""
        if token in self.ends:
            return "stop"
        if self.grammar is not None:
            self.grammar.accept(token)
        self.ids.append(token)
        text, piece = self.text, ""
        if text is not None:
            piece = text.push(token, stoppable=self.answered >= self.min_tokens)
        self._tell(Token(token, piece, logprob, top))
        if (text is not None and text.stopped) or (self.grammar is not None and self.grammar.complete):
            return "stop"
        return "length" if len(self.ids) >= self.reach else None

    def finish(self, reason: Reason, error: MasqueradeError | None = None) -> None:
        """Emit the last event, once."""
        if not self.finished:
            rest = self._flush() if reason in ("stop", "length") else ""
            self._tell(Finished(reason, error, rest))
            self.finished = True
            self.applied = None  # the mask may go, however long the answer is kept

    def _flush(self) -> str:
        """The text that was held back. A fault in making it must not keep the last event from its owner."""
        try:
            return self.text.flush() if self.text else ""
        except Exception:
            _log.exception("the rest of an answer cannot be made text")
            return ""

    def _tell(self, event: Event) -> None:
        """An owner that cannot listen any more has gone away; that must not disturb the others."""
        try:
            self.emit(event)
        except Exception:
            _log.exception("nobody listens to a request any more; it is cancelled")
            self.cancelled = True
