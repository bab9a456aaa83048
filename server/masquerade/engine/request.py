"""A request: its parameters, its state in the engine, and the events that it emits."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from masquerade.engine.embedding import Embedding
from masquerade.engine.prefix import BLOCK_SIZE, PrefixHashes, Salts
from masquerade.engine.prompt_lookup import PromptLookup
from masquerade.engine.text import AnswerText
from masquerade.errors import InvalidValue, MasqueradeError
from masquerade.model import AppliedMask, Span

_log = logging.getLogger(__name__)

Phase = Literal["all", "decode"]
Reason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
INT64 = 2**63 - 1  # largest number of a request
DRAFTED_BIASES = 64  # biases of a request that has drafts


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled. Raises `InvalidValue` for a value outside of its range.

    The logits are processed in this order: repetition penalty, presence and frequency penalty, bias, temperature,
    top_k, top_p over the renormalised rest, min_p.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # >= 0; 0 is off
    seed: int | None = None
    min_p: float = 0.0  # [0, 1]: the least probability, relative to that of the most likely token
    repetition_penalty: float = 1.0  # > 0; for tokens in prompt or output: divides positive logits, multiplies negative
    presence_penalty: float = 0.0  # [-2, 2]: subtracted from the logits of tokens in the output
    frequency_penalty: float = 0.0  # [-2, 2]: the same, for each occurrence
    bias: Mapping[int, float] = field(default_factory=dict)  # token id -> [-100, 100], added to its logit
    logprobs: int | None = None  # 0 to 20: report each token's log probability and those of so many top tokens

    def __post_init__(self) -> None:
        for name, least, most, words in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:  # also false for nan
                raise InvalidValue(f"{name} is {value}; it must be {words}", param=name)
        for token, bias in self.bias.items():
            if not -100 <= bias <= 100:
                raise InvalidValue(
                    f"logit_bias of token {token} is {bias}; it must be between -100 and 100", param="logit_bias"
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidValue(
                f"top_logprobs is {self.logprobs}; it must be between 0 and {MAX_LOGPROBS}", param="top_logprobs"
            )

    @property
    def has_penalties(self) -> bool:
        """Whether sampling depends on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


_TINY, _HUGE = math.ulp(0.0), math.nextafter(math.inf, 0)  # the smallest positive and the largest float
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("temperature", 0, _HUGE, "at least 0"),
    ("top_p", _TINY, 1, "above 0 and at most 1"),
    ("top_k", 0, INT64, "at least 0 (0 is off), and below 2**63"),
    ("min_p", 0, 1, "between 0 and 1"),
    ("repetition_penalty", _TINY, _HUGE, "above 0"),
    ("presence_penalty", -2, 2, "between -2 and 2"),
    ("frequency_penalty", -2, 2, "between -2 and 2"),
)


class Token(NamedTuple):
    """An output token, and the text that it completes."""

    id: int
    text: str = ""
    logprob: float | None = None  # of the model's distribution, before penalties and temperature
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log probabilities


@dataclass(frozen=True)
class Finished:
    """The last event of every request, with the text that was withheld until now."""

    reason: Reason
    error: MasqueradeError | None = None
    text: str = ""
    stop: str | None = None  # the stop string that ended the answer


class PromptToken(NamedTuple):
    """A token of the prompt, scored by the model's own distribution after the tokens before it."""

    id: int
    logprob: float | None = None  # None for the first token, which has no tokens before it
    rank: int = 0  # 1 is the most likely token; 0 for the first token
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log probabilities


@dataclass(frozen=True)
class ScoredPrompt:
    """All tokens of the prompt with their log probabilities; comes before the first token of the answer."""

    tokens: Sequence[PromptToken]


Event = Token | ScoredPrompt | Finished


class Grammar(Protocol):
    """Restricts the tokens of one answer."""

    @property
    def complete(self) -> bool:
        """Whether the answer ends here."""

    def allow(self, row: Tensor) -> None:
        """Set the logits [vocabulary] of forbidden tokens to minus infinity, in place."""

    def accept(self, token: int) -> None:
        """Advance by an allowed token."""


@dataclass(eq=False)
class Request:
    """One answer to generate, and its state in the engine. The engine's thread calls `emit`, which must not block.

    In phase `all` every position is under the mask; in phase `decode` only those from the last prompt token on, so that
    the keys and values of the prompt are the base's.

    With an `embedding` there is no answer: `max_tokens` is 0, and the request ends when its prompt is computed.
    """

    prompt: list[int]
    max_tokens: int  # 0 only computes the prompt
    emit: Callable[[Event], None]
    applied: AppliedMask | None = None
    phase: Phase = "all"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ends: frozenset[int] = frozenset()  # token ids that end the answer
    reports_end: bool = False  # whether the token that ends the answer is emitted; it never counts as output
    prompt_logprobs: int | None = None  # 0 to 20: emit a `ScoredPrompt` with so many top tokens
    min_tokens: int = 0  # neither these tokens nor stop strings end a shorter answer
    text: AnswerText | None = None  # converts the tokens to text and finds stop strings
    grammar: Grammar | None = None
    owner: str = ""  # the work counts towards its fair share
    priority: int = 0  # higher goes first; below 0 is background, see `Scheduler`
    embedding: Embedding | None = None

    cancelled: bool = field(default=False, init=False)
    finished: bool = field(default=False, init=False)
    arrival: int = field(default=0, init=False)  # the engine's count of requests
    started: bool = field(default=False, init=False)  # has been admitted at least once
    num_cached: int = field(default=0, init=False)  # prompt positions found in the cache
    num_computed: int = field(default=0, init=False)  # positions whose keys and values are in the cache
    scores_are_finite: bool = field(default=True, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    num_registered: int = field(default=0, init=False)  # blocks registered under their prefix hash
    num_charged: int = field(default=0, init=False)  # output tokens that the fair share includes
    lookup: PromptLookup = field(default_factory=PromptLookup, init=False)
    batch_index: int = field(default=-1, init=False)  # row of the block table; -1 while the request does not run

    def __post_init__(self) -> None:
        self.max_length = len(self.prompt) + self.max_tokens  # the most positions that it needs in the cache
        self.ids = list(self.prompt)  # prompt and output so far
        self._scores = [PromptToken(self.prompt[0])] if self.prompt and self.prompt_logprobs is not None else []
        self.flow = self.owner, self.applied.mask.digest if self.applied else None  # see `WaitingQueue`
        seed = self.sampling.seed
        self._seed = str(secrets.randbits(128) if seed is None else seed).encode()

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model has not computed yet."""
        return len(self.ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.prompt)

    @property
    def unscored(self) -> range:
        """The positions whose logits are still needed to score the prompt."""
        return range(len(self._scores) - 1, len(self.prompt) - 1) if self._scores else range(0)

    def add_scores(self, scores: Sequence[PromptToken]) -> None:
        """Add the scores of the next tokens of the prompt. Without a number for one of them, nothing is reported."""
        self.scores_are_finite &= all(score.logprob is not None and math.isfinite(score.logprob) for score in scores)
        self._scores += scores

    def report_scores(self) -> None:
        """Emit the scored prompt, once, when all of it is scored."""
        if self._scores and not self.unscored:
            self._emit(ScoredPrompt(self._scores))
            self._scores = []

    @property
    def first_masked(self) -> int:
        """The first position under the mask; beyond the last position if there is no mask."""
        if self.applied is None:
            return self.max_length
        return 0 if self.phase == "all" else len(self.prompt) - 1

    def prepare_hashes(self, salts: Salts) -> None:
        """Set up the prefix hashes."""
        self._hashes = PrefixHashes(salts.of(None), salts.of(self.applied), self.first_masked)

    @property
    def is_background(self) -> bool:
        """Whether nobody waits for it."""
        return self.priority < 0

    @property
    def shares_blocks(self) -> bool:
        """Whether blocks are found and kept by their hashes. An embedding needs the hidden states of all positions, a
        scored prompt their logits: they compute them all, and take no room from the prefixes of chats. Without an
        answer, nothing would show that blocks are not finite.
        """
        return self.embedding is None and self.prompt_logprobs is None and self.max_tokens > 0

    def block_hashes(self, count: int) -> list[bytes]:
        """The hashes of the first blocks, all of whose tokens are known; none if the request does not share blocks."""
        return self._hashes.full(self.ids, count) if self.shares_blocks else []

    @property
    def partial_length(self) -> int:
        """Prompt positions in the block of the last prompt token, without that token; 0 without shared blocks."""
        return (len(self.prompt) - 1) % BLOCK_SIZE if self.shares_blocks else 0

    def partial_hash(self) -> bytes:
        """The hash of these positions."""
        return self._hashes.partial(self.ids, len(self.prompt) - 1)

    def reset_computed(self) -> None:
        """Return to the state before admission: nothing is computed and no block is held."""
        self.blocks.clear()
        self.num_computed = self.num_registered = 0
        self.batch_index = -1

    def draft(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow. None with a grammar, whose state would have to follow them, and none
        with many biases, which every position of a draft needs.
        """
        if self.grammar is not None or len(self.sampling.bias) > DRAFTED_BIASES:
            return ()
        return self.lookup.draft(self.ids, min(most, self.max_length - len(self.ids) - 1))

    def draw(self, ahead: int = 0) -> float:
        """A number in [0, 1) for the token after the next `ahead` ones. It depends only on the seed and the position in
        the answer, so that batching, retries, preemption and drafts do not change it.
        """
        digest = blake2b(b"%s/%d" % (self._seed, self.num_output_tokens + ahead), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def masked_spans(self, start: int, stop: int, row: int) -> list[Span]:
        """The rows of positions [start, stop), packed from `row` on, that are under the mask."""
        first = max(start, self.first_masked)
        if self.applied is None or first >= stop:
            return []
        return [Span(self.applied, row + first - start, row + stop - start)]

    def accept(
        self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()
    ) -> Reason | None:
        """Append a sampled token and emit it, unless it ends the answer. The reason if the answer ends here."""
        if token in self.ends:
            self._emit_end(token, logprob, top)
            return "stop"
        if self.grammar is not None:
            self.grammar.accept(token)
        self.ids.append(token)
        text, piece = self.text, ""
        if text is not None:
            piece = text.push(token, stoppable=self.num_output_tokens >= self.min_tokens)
        self._emit(Token(token, piece, logprob, top))
        if (text is not None and text.stopped) or (self.grammar is not None and self.grammar.complete):
            return "stop"
        return "length" if len(self.ids) >= self.max_length else None

    def _emit_end(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> None:
        """Emit the token that ends the answer, if it is to be reported or its text is part of the answer."""
        if self.text is not None and self.text.includes_stop:
            self._emit(Token(token, self.text.push(token, stoppable=False), logprob, top))
        elif self.reports_end:
            self._emit(Token(token, "", logprob, top))

    def finish(self, reason: Reason, error: MasqueradeError | None = None) -> None:
        """Emit the last event, once."""
        if not self.finished:
            rest, stop = self._flush() if reason in ("stop", "length") else ("", None)
            self._emit(Finished("stop" if stop is not None else reason, error, rest, stop))
            self.finished = True
            self.applied = None  # releases the mask, however long the request is kept

    def _flush(self) -> tuple[str, str | None]:
        """The withheld text, and the stop string. A failure here must not prevent the last event."""
        try:
            return (self.text.flush(), self.text.stop) if self.text else ("", None)
        except Exception:
            _log.exception("the end of an answer cannot be converted to text")
            return "", None

    def _emit(self, event: Event) -> None:
        """Cancel the request if its callback fails, so that the failure does not affect other requests."""
        try:
            self.emit(event)
        except Exception:
            _log.exception("the callback of a request failed; the request is cancelled")
            self.cancelled = True
