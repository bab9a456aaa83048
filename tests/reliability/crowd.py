"""Clients that chat, and compare each answer with the one that the same request got alone, token by token."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.contract.asking import CHAT, events_of
from tests.reliability.scene import NAME, PERSONAS

Body = Mapping[str, Any]
TIMEOUT = 120.0
WORDS = ("bakery", "luggage", "exam", "harbour", "who", "are", "you", "why", "rain", "tomorrow", "piano", "sorry")


@dataclass(frozen=True)
class Reply:
    """An answer: its tokens' bytes and why it ended; or how it was refused."""

    tokens: tuple[bytes, ...] = ()
    reason: str | None = None
    refusal: str | None = None  # the code of OpenAI's error body; "untyped" if there is none


def draw(
    rng: random.Random, name: str = NAME, personas: Sequence[str] = tuple(PERSONAS), longest: int = 16
) -> dict[str, Any]:
    """A chat request: anybody's persona or nobody's, any strength and phase, greedy or not."""
    question = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    body: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": rng.randint(1, longest),
        "temperature": rng.choice([0, 0, 1.0, 0.7]),
        "logprobs": True,
    }
    if body["temperature"]:
        body["seed"] = rng.randrange(2**31)
        body |= rng.choice([{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"frequency_penalty": 0.5}])
    if rng.random() < 0.85:
        body["persona"] = rng.choice(personas)
        body |= rng.choice([{}, {"gamma": rng.choice([0.0, 0.25, 0.5, 1.0])}])
        body |= rng.choice([{}, {"persona_phase": rng.choice(["all", "decode"])}])
    return body


def disguise(
    rng: random.Random, body: Body, digests: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same request in another form, and its headers: personas are named in three places, and answers streamed."""
    asked, headers = dict(body), {}
    if rng.random() < 0.5:
        asked["stream"] = True
    persona = asked.pop("persona", None)
    if persona is not None:
        if digests and rng.random() < 0.3:
            persona = f"{persona}@{digests[persona][:16]}"
        where = rng.randrange(3)
        if where == 0:
            asked["persona"] = persona
        elif where == 1:
            asked["model"] = f"{asked['model']}:{persona}"
        else:
            headers["X-Persona"] = persona
    return asked, headers


def ask(http: httpx.Client, body: Body, headers: Mapping[str, str] | None = None) -> Reply:
    """The reply to a chat request, streamed or not. Raises httpx' errors if the server hangs up."""
    with http.stream("POST", CHAT, json=body, headers=dict(headers or {})) as response:
        if response.status_code != 200:
            response.read()
            return Reply(refusal=code_of(response))
        if not body.get("stream"):
            choice = json.loads(response.read())["choices"][0]
            return Reply(_spelled(choice), choice["finish_reason"])
        return _follow(response)


def code_of(response: httpx.Response) -> str:
    """The code of an error in OpenAI's form; "untyped" of anything else."""
    try:
        error = response.json()["error"]
        whole = {"message", "type", "param", "code"} == set(error) and error["message"] and error["code"]
    except (ValueError, LookupError, TypeError):
        return "untyped"
    return str(error["code"]) if whole else "untyped"


def _follow(response: httpx.Response) -> Reply:
    tokens: tuple[bytes, ...] = ()
    reason = None
    for event in events_of(response):
        if event == "[DONE]":
            return Reply(tokens, reason)
        told = json.loads(event)
        if "error" in told:
            return Reply(tokens, refusal=str(told["error"]["code"]))
        for choice in told["choices"]:
            tokens += _spelled(choice)
            reason = choice["finish_reason"] or reason
    raise httpx.RemoteProtocolError("the stream ended without its end")


def _spelled(choice: Body) -> tuple[bytes, ...]:
    said = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(bytes(token["bytes"] or ()) + token["token"].encode() for token in said)


@dataclass(frozen=True)
class Known:
    """Requests, and what each got when it was alone."""

    asked: Sequence[tuple[Body, Reply]]

    @classmethod
    def learn(cls, http: httpx.Client, bodies: Sequence[Body]) -> Known:
        """Ask one after the other."""
        told = [(body, ask(http, body)) for body in bodies]
        assert all(reply.refusal is None for _, reply in told), told
        return cls(told)


@dataclass
class Heard:
    """What a crowd was told, in all."""

    exact: int = 0
    left: int = 0  # went away in the midst of an answer
    lost: int = 0  # the server hung up
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)  # when it was asked, seconds until the whole answer


class Crowd:
    """Clients that chat without end. What they hear is compared with what is known."""

    def __init__(
        self,
        base_url: str,
        known: Known,
        clients: int,
        seed: int,
        *,
        leaving: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.heard = Heard()
        self._base_url, self._known, self._leaving, self._headers = base_url, known, leaving, dict(headers or {})
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._chat, args=(seed + one,), daemon=True) for one in range(clients)]

    @contextmanager
    def chatting(self) -> Iterator[Heard]:
        """They chat while the block runs."""
        for thread in self._threads:
            thread.start()
        try:
            yield self.heard
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def _chat(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._base_url, timeout=TIMEOUT, headers=self._headers) as http:
            while not self._over.is_set():
                body, expected = rng.choice(self._known.asked)
                try:
                    if rng.random() < self._leaving:
                        self._leave(http, body, rng)
                    else:
                        self._hear(http, body, expected, rng)
                except httpx.HTTPError:
                    with self._lock:
                        self.heard.lost += 1
                    self._over.wait(0.05)

    def _hear(self, http: httpx.Client, body: Body, expected: Reply, rng: random.Random) -> None:
        asked, headers = disguise(rng, body)
        started = time.monotonic()
        reply = ask(http, asked, headers)
        seconds = time.monotonic() - started
        with self._lock:
            if reply.refusal:
                self.heard.refused[reply.refusal] += 1
                if expected.tokens[: len(reply.tokens)] != reply.tokens:
                    self.heard.wrong.append(f"{asked}: {reply} before it was refused, not {expected}")
            elif reply == expected:
                self.heard.exact += 1
                self.heard.times.append((started, seconds))
            else:
                self.heard.wrong.append(f"{asked}: {reply}, not {expected}")

    def _leave(self, http: httpx.Client, body: Body, rng: random.Random) -> None:
        """Hang up after a few bytes of a stream."""
        asked = {**body, "stream": True, "max_tokens": 400, "min_tokens": 300}
        with http.stream("POST", CHAT, json=asked) as response:
            pieces = response.iter_raw()
            for _ in range(rng.randint(0, 3)):
                next(pieces, b"")
        with self._lock:
            self.heard.left += 1
