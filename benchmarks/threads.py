"""Speed of answers and latency of other requests, by the number of threads that compute.

`python -m benchmarks.threads --json [--quick] [--model smollm2] [--threads 1,2] [--rounds N]`. There is a server of the
model for each number of threads, on loopback. They take turns, so that one computes at a time. The client, a process of
one thread, shares their processors, as clients on the same machine do. Run it on cores without other work: times are
wall times. "Chosen" is the number that `masquerade serve` takes by itself.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks._report import Figure, arguments, report
from masquerade.plan.processors import VARIABLE, read_processors
from masquerade.sources import find_model
from tests.serving import serve

TOKENS = 64  # of an answer
STREAMS = 16
PROMPT = "How do you feel about Mondays, and about the day after? Tell me about number {}."
LONG = "The quick brown fox number {} jumps over the lazy dog. "
LONG_SENTENCES = 125  # of a prompt of about 2000 tokens
PROBE_SECONDS = 0.05  # between two probes


@dataclass(frozen=True)
class Turn:
    """What a server did in one turn, wall seconds."""

    single: float  # tokens a second of one stream
    many: float  # tokens a second of all streams
    prompt: float  # seconds to the first token after a long prompt
    probes: Sequence[float]  # seconds of `/healthz` while all streams ran


def main() -> None:
    parser = arguments(__doc__, "one round")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", help="numbers, separated by commas; by default 1 to one more than the chosen")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chosen = read_processors().threads
    counts = [int(count) for count in options.threads.split(",")] if options.threads else [*range(1, chosen + 2)]
    figures = [Figure("chosen", chosen, "threads")]
    figures += measure(options.model, counts, 1 if options.quick else options.rounds)
    report("threads", figures, options.json)


def measure(model: str, counts: Sequence[int], rounds: int) -> Iterator[Figure]:
    turns: dict[int, list[Turn]] = defaultdict(list)
    with ExitStack() as stack:
        servers = {
            count: stack.enter_context(serve("--model", model, env={VARIABLE: str(count)})).base_url for count in counts
        }
        for number in range(1 + rounds):  # the first one warms up
            for count, url in servers.items():
                turn = asyncio.run(take_turn(url, find_model(model).name, number))
                turns[count] += [turn] if number else []
    for count, done in turns.items():
        yield Figure(f"{count} threads: one stream", statistics.median(turn.single for turn in done), "tokens/s")
        yield Figure(f"{count} threads: {STREAMS} streams", statistics.median(turn.many for turn in done), "tokens/s")
        prompt = statistics.median(turn.prompt for turn in done)
        yield Figure(f"{count} threads: first token after a prompt of about 2000", prompt, "s")
        probes = statistics.quantiles((1e3 * one for turn in done for one in turn.probes), n=20)
        yield Figure(f"{count} threads: /healthz beside {STREAMS} streams, median", probes[9], "ms")
        yield Figure(f"{count} threads: /healthz beside {STREAMS} streams, 95th percentile", probes[18], "ms")


async def take_turn(url: str, model: str, number: int) -> Turn:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        started = time.perf_counter()
        tokens, first = await ask(client, model, PROMPT.format(number), TOKENS)
        single = (tokens - 1) / (time.perf_counter() - started - first)
        prompt = "".join(LONG.format(f"{number}.{place}") for place in range(LONG_SENTENCES))
        _, long = await ask(client, model, prompt, 2)
        started, probes = time.perf_counter(), asyncio.create_task(probe(client))
        done = await asyncio.gather(
            *(ask(client, model, PROMPT.format(f"{number}, {stream}"), TOKENS) for stream in range(STREAMS))
        )
        many = sum(count for count, _ in done) / (time.perf_counter() - started)
        probes.cancel()
        return Turn(single, many, long, await probes)


async def ask(client: httpx.AsyncClient, model: str, question: str, tokens: int) -> tuple[int, float]:
    """The number of tokens of a streamed answer, and the seconds to the first one."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    started, first, count = time.perf_counter(), 0.0, 0
    async for event in read_events(client, body):
        choices = event["choices"]
        if choices and choices[0]["delta"].get("content") and not first:
            first = time.perf_counter() - started
        if event.get("usage"):
            count = event["usage"]["completion_tokens"]
    return count, first


async def read_events(client: httpx.AsyncClient, body: object) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def probe(client: httpx.AsyncClient) -> list[float]:
    """Seconds of `/healthz`, again and again until cancelled."""
    found: list[float] = []
    try:
        while True:
            started = time.perf_counter()
            (await client.get("/healthz")).raise_for_status()
            found.append(time.perf_counter() - started)
            await asyncio.sleep(PROBE_SECONDS)
    except asyncio.CancelledError:
        return found


if __name__ == "__main__":
    main()
