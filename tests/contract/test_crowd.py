"""More requests than places, and clients that leave."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from masquerade.engine import EngineConfig
from masquerade.http.limits import Protocol
from masquerade.service.serving import Serving
from tests import world
from tests.access.conftest import publish
from tests.contract.asking import CHAT, error_of
from tests.contract.conftest import NEVER
from tests.contract.here import serve_here

GUESTS = 12
LONG = 8000  # tokens; seconds of work


def post(narrow: httpx.Client, max_tokens: int = LONG, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Hi."}]
    return narrow.post(CHAT, json={"model": "rambler", "messages": messages, "max_tokens": max_tokens, **fields})


def crowd(narrow: httpx.Client, **fields: Any) -> list[httpx.Response]:
    """Many requests at once; drawn again in the rare case that they came one after the other."""
    for _ in range(5):
        with ThreadPoolExecutor(GUESTS) as pool:
            responses = list(pool.map(lambda seed: post(narrow, 200, seed=seed, **fields), range(GUESTS)))
        if any(response.status_code != 200 for response in responses):
            return responses
    raise AssertionError(f"{GUESTS} requests at once never filled one running and one waiting place")


@pytest.fixture
def _no_records() -> Iterator[None]:
    """pytest keeps each record of the log, and whether a request writes some depends on the tests before."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_refuses_and_says_when_to_return(narrow: httpx.Client, stream: bool) -> None:
    refused = [response for response in crowd(narrow, stream=stream) if response.status_code != 200]
    for response in refused:
        error = error_of(response)
        assert (response.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(response.headers["Retry-After"]) >= 1


def test_a_full_queue_still_serves_those_who_are_in(narrow: httpx.Client) -> None:
    served = [response for response in crowd(narrow) if response.status_code == 200]
    assert len(served) >= 2
    assert {response.json()["usage"]["completion_tokens"] for response in served} == {200}


def test_after_the_crowd_there_is_room(narrow: httpx.Client) -> None:
    crowd(narrow)
    assert post(narrow, 4).status_code == 200


def test_the_sdk_sees_a_rate_limit(narrow: httpx.Client) -> None:
    def ask(seed: int) -> type[Exception] | None:
        try:
            client.chat.completions.create(
                model="rambler", messages=[{"role": "user", "content": "Hi."}], max_tokens=200, seed=seed
            )
        except openai.APIStatusError as error:
            return type(error)
        return None

    seen: set[type[Exception] | None] = set()
    with (
        OpenAI(base_url=str(narrow.base_url.join("/v1")), api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(GUESTS) as pool,
    ):
        for _ in range(5):
            seen |= set(pool.map(ask, range(GUESTS)))
            if len(seen) > 1:
                break
    assert seen == {None, openai.RateLimitError}


def leave_a_stream(narrow: httpx.Client) -> None:
    fields = {"model": "rambler", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": LONG, "stream": True}
    with narrow.stream("POST", CHAT, json=fields) as response:
        assert response.status_code == 200, response.read()
        next(response.iter_bytes(1))


def leave_a_completion(narrow: httpx.Client) -> None:
    timeout = httpx.Timeout(60, read=0.1)
    with httpx.Client(base_url=narrow.base_url, timeout=timeout) as hasty, pytest.raises(httpx.ReadTimeout):
        post(hasty)


@pytest.mark.parametrize("leave", [leave_a_stream, leave_a_completion])
def test_who_leaves_frees_the_place(narrow: httpx.Client, leave: Callable[[httpx.Client], None]) -> None:
    """Six that leave, each followed by one that wants a token: far less work than six that stay."""
    before = said(narrow)
    for _ in range(6):
        leave(narrow)
        while post(narrow, 1).status_code != 200:  # it takes a moment to notice who left
            time.sleep(0.01)
    assert said(narrow) - before < 6 * LONG / 2


def said(narrow: httpx.Client) -> float:
    """Tokens of answers since the server started."""
    name = "masquerade_engine_sampled_tokens_total "
    return next(
        float(line.removeprefix(name)) for line in narrow.get("/metrics").text.splitlines() if line.startswith(name)
    )


def read_resident_bytes() -> int:
    """Of this process, which is the server's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class TestLoad:
    """200 at once, of whom a third leave at a moment that was drawn; some want the base, others personas."""

    CLIENTS = 200
    WORN = (None, "anna", "ben", "cleo")

    def crowd(self, http: httpx.Client, seed: int) -> list[str]:
        """How each fared: `whole`, `left` or `refused`."""
        chance = random.Random(seed)
        plans = [
            (number % 3 == 0, chance.random() < 0.5, chance.randrange(6), chance.choice(self.WORN))
            for number in range(self.CLIENTS)
        ]

        async def visit(
            client: httpx.AsyncClient, leaves: bool, streams: bool, patience: int, persona: str | None
        ) -> str:
            said = [{"role": "user", "content": f"Hi {patience}."}]
            fields = {"model": "random", "messages": said, "max_tokens": 12 + 4 * patience, "stream": streams}
            fields["persona"] = persona
            if leaves and not streams:
                try:
                    async with asyncio.timeout(0.05 + patience / 20):
                        await client.post(CHAT, json=fields)
                except TimeoutError:
                    return "left"
                return "whole"
            async with client.stream("POST", CHAT, json=fields) as response:
                if response.status_code != 200:
                    assert response.status_code == 429, await response.aread()
                    return "refused"
                seen = 0
                async for line in response.aiter_lines():
                    seen += line.startswith("data: ")
                    if leaves and seen > patience:
                        return "left"
                return "whole"

        async def open_doors() -> list[str]:
            limits = httpx.Limits(max_connections=self.CLIENTS)
            async with httpx.AsyncClient(base_url=http.base_url, timeout=120, limits=limits) as client:
                return await asyncio.gather(*(visit(client, *plan) for plan in plans))

        return asyncio.run(open_doors())

    @pytest.mark.usefixtures("_no_records")
    def test_nothing_is_left_of_a_crowd(self, tmp_path: Path) -> None:
        folder = world.make_model(tmp_path / "random", eos_token_id=NEVER)
        config = EngineConfig(max_running=16, max_waiting=150)
        with serve_here(folder, tmp_path / "store", config) as (serving, http):
            publish(serving, *(name for name in self.WORN if name), "last")
            sizes, resident = [], []
            for seed in range(3):
                fared = self.crowd(http, seed)
                assert len(fared) == self.CLIENTS
                assert {"whole", "left"} <= set(fared)
                self.wait_until_empty(serving)
                said = [{"role": "user", "content": "Hi."}]
                asked = {"model": "random", "messages": said, "max_tokens": 2}
                assert http.post(CHAT, json=asked).status_code == 200
                self.wait_until_empty(serving)
                self.wait_until_alone()
                sizes.append(len(gc.get_objects()))
                resident.append(read_resident_bytes())
            self.check_that_no_mask_is_held(serving, http)
        # Threads of the pool and timers that were cancelled come and go; a request is more than eight objects.
        assert sizes[2] < sizes[1] + 8 * self.CLIENTS
        assert resident[2] < resident[1] + 2**25

    def check_that_no_mask_is_held(self, serving: Serving, http: httpx.Client) -> None:
        """Those who left hold none: with room for one, a newcomer's mask takes the place of all others at once."""
        residency = serving.residency
        assert residency.nbytes > 0
        digest = serving.registry.resolve("last").digest
        with serving.store.reader(digest) as mask:
            residency.budget = serving.manager.measure(mask)
        said = [{"role": "user", "content": "Hi."}]
        asked = {"model": "random:last", "messages": said, "max_tokens": 2}
        assert http.post(CHAT, json=asked).status_code == 200
        self.wait_until_empty(serving)
        assert (residency.evicting, residency.waiting) == (0, 0)
        assert residency.nbytes <= residency.budget

    def wait_until_alone(self) -> None:
        """No connection of the crowd is left; the server closes those that are idle after some seconds."""
        for _ in range(150):
            gc.collect()
            if sum(issubclass(type(one), Protocol) for one in gc.get_objects()) <= 1:
                return
            time.sleep(0.1)
        raise AssertionError("connections are left")

    def wait_until_empty(self, serving: Serving) -> None:
        """No request runs or waits, and no page is held by one; who left is noticed within a step."""
        for _ in range(600):
            held = serving.engine.occupancy
            if not (held.running or held.waiting or held.blocks_used):
                return
            time.sleep(0.05)
        raise AssertionError(held)
