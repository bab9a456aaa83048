"""How long a stream and a crowd of short chats wait: quiet, and while large or hostile input arrives."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from masquerade import demo
from masquerade.keys import mint
from tests.contract.asking import CHAT, body, events_of
from tests.keys.making import bearer, make_key
from tests.maskstore import forge
from tests.reliability.crowd import TIMEOUT, Crowd, Heard, Known, code_of, draw
from tests.reliability.hostile import look
from tests.reliability.report import Progress, Row, Scale
from tests.reliability.scene import ailments
from tests.serving import serve

SECONDS, LEAST = 30, 8  # of each load in a full run, and in any
PERSONAS = ("formal", "gloomy", "introvert")
CLIENTS = 3
SLOWER = 2.0  # p95 beside a load against p95 without one
LONG = 400  # tokens of a stream
LINE, PROMPT, FITTING = 30 * 10**6, 30 * 10**6, 79 * 10**5  # bytes; the last is just below what a body may have
GUESSES, GUESSERS = 1000, 30
JOB_SECONDS = 600.0
WORD = "good day "
STRANGE = (
    "[]",
    "{}",
    "null",
    '{"parents": [[]]}',
    '{"parents": {"a": 1}}',
    "[" * 50_000,
    '"' + "x" * 10**5 + '"',
    "1e999",
)

Told = Counter[str]


@dataclass
class Listener:
    """One client that listens to one long stream after the other, and notes every pause within them."""

    base_url: str
    headers: dict[str, str]
    pauses: list[tuple[float, float]] = field(default_factory=list)  # when it began, seconds
    faults: list[str] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """It listens while the block runs."""
        over = threading.Event()
        thread = threading.Thread(target=self._listen, args=(over,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _listen(self, over: threading.Event) -> None:
        asked = body(persona="casual", max_tokens=LONG, min_tokens=LONG, stream=True)
        with httpx.Client(base_url=self.base_url, timeout=TIMEOUT, headers=self.headers) as http:
            while not over.is_set():
                try:
                    self._follow(http, asked)
                except httpx.HTTPError as error:
                    self.faults.append(f"a stream: {type(error).__name__}")
                    over.wait(0.1)

    def _follow(self, http: httpx.Client, asked: dict[str, Any]) -> None:
        with http.stream("POST", CHAT, json=asked) as answer:
            if answer.status_code != 200:
                answer.read()
                self.faults.append(f"a stream: {code_of(answer)}")
                return
            last = time.monotonic()
            for event in events_of(answer):
                now = time.monotonic()
                self.pauses.append((last, now - last))
                last = now
                if '"error"' in event:
                    self.faults.append(f"a stream: {event:.200}")

    def longest(self, begin: float, end: float) -> float:
        """The longest pause of which a part lies within a time."""
        return max((seconds for at, seconds in self.pauses if at < end and at + seconds > begin), default=float("nan"))


@dataclass(frozen=True)
class Target:
    """A server under load, and a key that may do everything there."""

    base_url: str
    key_id: str
    headers: dict[str, str]

    @contextmanager
    def connect(self) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=self.base_url, timeout=TIMEOUT, headers=self.headers) as http:
            yield http


def send_line(target: Target, told: Told) -> list[str]:
    """A file of sound lines and one of 30 MB, and the job that reads it, to its end."""
    with target.connect() as http:
        answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", _write_lines())})
        if answer.status_code != 200:
            return look("the file", answer, told, None)
        mask = {"score": "attribution", "rho": 0.003, "phase": "all", "force": True, "replace": True}
        order = {"model": "demo", "training_file": answer.json()["id"], "suffix": "large"}
        answer = http.post("/v1/fine_tuning/jobs", json=order | {"method": {"type": "mask", "mask": mask}})
        if answer.status_code != 200:
            return look("the job", answer, told, None)
        job, deadline = answer.json()["id"], time.monotonic() + JOB_SECONDS
        while (now := http.get(f"/v1/fine_tuning/jobs/{job}").json())["status"] not in {"succeeded", "failed"}:
            if time.monotonic() > deadline:
                return [f"the job is {now['status']} after {JOB_SECONDS:.0f} s"]
            time.sleep(0.1)
    told[f"job {now['status']}{': ' + now['error']['code'] if now['status'] == 'failed' else ''}"] += 1
    return []


@cache
def _write_lines() -> bytes:
    lines = (demo.DATA / "casual.train.jsonl").read_bytes().splitlines()[:48]
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": WORD * (LINE // len(WORD))}]
    return b"\n".join([*lines, json.dumps({"messages": said}).encode()])


def send_prompt(target: Target, told: Told) -> list[str]:
    """One prompt of 30 MB."""
    return _ask(target, told, PROMPT)


def send_prompts(target: Target, told: Told) -> list[str]:
    """Six prompts at once of as many bytes as a body may have."""
    with ThreadPoolExecutor(6) as pool:
        return [fault for faults in pool.map(lambda _: _ask(target, told, FITTING), range(6)) for fault in faults]


def _ask(target: Target, told: Told, size: int) -> list[str]:
    with target.connect() as http:
        answer = http.post(CHAT, content=_write_prompt(size), headers={"Content-Type": "application/json"})
    return look(f"a prompt of {size} bytes", answer, told, {"context_length_exceeded", "body_too_large", "queue_full"})


@cache
def _write_prompt(size: int) -> bytes:
    return json.dumps(body(WORD * (size // len(WORD)))).encode()


def send_guesses(target: Target, told: Told) -> list[str]:
    """A thousand requests with bad keys, half of them of an id that exists."""

    def guess(client: int) -> list[str]:
        faults = []
        with httpx.Client(base_url=target.base_url, timeout=TIMEOUT) as http:
            for number in range(client, GUESSES, GUESSERS):
                wrong = mint()
                token = f"mq-{target.key_id}-{wrong.token[-48:]}" if number % 2 else wrong.token
                answer = http.get("/v1/models", headers=bearer(token))
                faults += look("a bad key", answer, told, {"invalid_api_key"})
        return faults

    with ThreadPoolExecutor(GUESSERS) as pool:
        return [fault for faults in pool.map(guess, range(GUESSERS)) for fault in faults]


def send_metadata(target: Target, told: Told) -> list[str]:
    """Imports of a sound mask with something strange in each field of its metadata; then everything is looked at."""
    faults = []
    raw = (demo.PERSONAS / "formal.safetensors").read_bytes()
    with target.connect() as http:
        for name in sorted(forge.split(raw)[0]["__metadata__"]):
            for number, value in enumerate(STRANGE):
                content = forge.edit(raw, lambda document, name=name, value=value: _set(document, name, value))
                answer = http.put(f"/v1/personas/forged-{number}/content", content=content)
                faults += look(f"{name} = {value:.40}", answer, told, None, may_succeed=True)
        for path in ("/v1/personas", *(f"/v1/personas/forged-{number}" for number in range(len(STRANGE)))):
            answer = http.get(path)
            if answer.status_code not in {200, 404}:
                faults.append(f"{path}: {answer.status_code} {answer.text:.200}")
    return faults


def _set(document: forge.Document, name: str, value: str) -> None:
    document["__metadata__"][name] = value


def wait(target: Target, told: Told) -> list[str]:
    """Nothing."""
    return []


LOADS: dict[str, tuple[str, Callable[[Target, Told], list[str]]]] = {
    "nothing else": ("quiet", wait),
    "a training file with a line of 30 MB, and its job": ("`POST /v1/files`, `/v1/fine_tuning/jobs`", send_line),
    "a prompt of 30 MB": ("a chat", send_prompt),
    "six prompts of 7.9 MB at once": ("six chats", send_prompts),
    "1 000 requests with bad keys": (f"{GUESSERS} clients, known and unknown ids", send_guesses),
    "imports with hostile metadata": ("`PUT /v1/personas/{name}/content`", send_metadata),
}


@dataclass(frozen=True)
class Phase:
    """What was heard while one load went on."""

    load: str
    how: str
    begin: float
    end: float
    rounds: int
    told: Told
    faults: Sequence[str]


def play(scale: Scale, progress: Progress) -> Iterator[Row]:
    """One load after the other, each again and again until its time is over."""
    rng = random.Random(scale.seed)
    with tempfile.TemporaryDirectory(prefix="masquerade-stalls-") as folder:
        store = Path(folder, "store")
        token, key = make_key(store, "admin")
        with serve("--model", "demo", "--store", str(store)) as server:
            target = Target(server.base_url, key.id, bearer(token))
            with target.connect() as http:
                known = Known.learn(http, [draw(rng, "demo", PERSONAS, longest=8) for _ in range(20)])
            crowd = Crowd(server.base_url, known, CLIENTS, scale.seed, headers=target.headers)
            with (
                ProcessPoolExecutor(1, get_context("spawn")) as sender,
                Listener(server.base_url, target.headers).listening() as listener,
                crowd.chatting() as heard,
            ):
                sender.submit(send, "nothing else", target).result()  # everything is imported
                phases = []
                for number, load in enumerate(LOADS, 1):
                    phases.append(run(load, target, sender, scale.of(SECONDS, LEAST)))
                    progress(number, len(LOADS), "loads")
            faults = [*heard.wrong[:2], *(f"refused: {code}" for code in heard.refused), *listener.faults[:2]]
            faults += ailments(store)
            faults += ["stack traces in its log"] if "Traceback" in server.said() else []
    quiet = phases[0]
    yield from (judge(phase, quiet, heard, listener) for phase in phases)
    yield Row(
        "whoever chats meanwhile hears nothing of it",
        "chats of known requests and streams all the while; then the store and the log",
        f"{heard.exact} answers",
        f"{len(heard.wrong)} different, {sum(heard.refused.values())} refused, {heard.lost} cut off"
        + "".join(f"; {one}" for one in faults[:3]),
        kept=not faults and not heard.lost and heard.exact > 0,
    )


def run(load: str, target: Target, sender: ProcessPoolExecutor, seconds: float) -> Phase:
    """Send a load until the time is over, and at least once; from another process, so that sending it delays only the
    server, not those who listen here.
    """
    told, faults, rounds, begin = Told(), list[str](), 0, time.monotonic()
    while not rounds or (time.monotonic() < begin + seconds and not faults):
        heard, wrong = sender.submit(send, load, target).result()
        told += heard
        faults += wrong
        rounds += 1
        time.sleep(0.5)  # what it left behind belongs to it
    return Phase(load, LOADS[load][0], begin, time.monotonic(), rounds, told, faults)


def send(load: str, target: Target) -> tuple[Told, list[str]]:
    """A load once: what the server said, and what should not have been."""
    told = Told()
    try:
        return told, LOADS[load][1](target, told)
    except httpx.HTTPError as error:
        return told, [f"whoever sent it: {type(error).__name__}"]


def judge(phase: Phase, quiet: Phase, heard: Heard, listener: Listener) -> Row:
    """The row of a load, beside what was measured without one."""
    times, usual = ([took for at, took in heard.times if one.begin <= at < one.end] for one in (phase, quiet))
    p95, before = _p95(times), _p95(usual)
    pause, calm = (listener.longest(one.begin, one.end) for one in (phase, quiet))
    count = f"{len(times)} chats in {phase.end - phase.begin:.0f} s"
    result = f"longest pause of a stream {1000 * pause:.0f} ms; p95 of a short chat {1000 * p95:.0f} ms"
    if phase is quiet:
        return Row(f"beside {phase.load}: what the others are held against", phase.how, count, result, kept=bool(times))
    said = ", ".join(f"{number} {code}" for code, number in phase.told.most_common())
    return Row(
        f"beside {phase.load}, short chats take at most {SLOWER:g} times as long",
        phase.how,
        f"{phase.rounds} times; {count}",
        f"{result} (quiet: {1000 * calm:.0f} and {1000 * before:.0f} ms); told: {said or 'nothing'}"
        + "".join(f"; {one}" for one in phase.faults[:3]),
        kept=bool(times) and p95 <= SLOWER * before and not phase.faults,
    )


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))] if values else float("nan")
