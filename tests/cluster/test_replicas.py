"""`serve --replicas 2`: one address, two engines in processes of their own, one answer."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.replicas import list_processes
from tests import serving
from tests.serving import Server

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
PERSONAS = ["casual", "cheerful", "extravert", "formal", "gloomy", "introvert", "power_averse", "power_seeking"]
QUESTION = [{"role": "user", "content": "What do you like to do on a sunny day?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store")
    with serving.serve(
        "--replicas", "2", "--store", str(store), "--drain-seconds", "60", env={}, start_seconds=300
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=120) as made:
        yield made


def say(client: OpenAI, persona: str, tokens: int = 12) -> str:
    found = client.chat.completions.create(
        model=f"demo:{persona}", messages=QUESTION, max_tokens=tokens, temperature=0, seed=1
    )
    return str(found.choices[0].message.content)


def read_metric(server: Server, name: str, **labels: str) -> dict[str, float]:
    """The value of a metric by replica, summed over its other labels."""
    text = httpx.get(f"{server.base_url}/metrics").raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                replica = sample.labels["replica"]
                found[replica] = found.get(replica, 0.0) + sample.value
    return found


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def find_pids(server: Server) -> dict[int, None]:
    """The replicas' processes, in the order of their starts."""
    return dict.fromkeys(map(int, re.findall(r"\(ServeReplica:masquerade:engine pid=(\d+)\)", server.said())))


def test_answers_are_those_of_one_server(server: Server, client: OpenAI) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(lambda persona: say(client, persona), 2 * PERSONAS)]
    with serving.serve() as single, OpenAI(base_url=f"{single.base_url}/v1", api_key="none") as other:
        assert answers == 2 * [say(other, persona) for persona in PERSONAS]


def test_most_masks_are_loaded_by_one_replica_and_both_work(server: Server, client: OpenAI) -> None:
    """A queue that was long when the replicas had begun may have spilled a request or two."""
    for _ in range(3):
        for persona in PERSONAS:
            say(client, persona, tokens=1)
    loads = read_metric(server, "masquerade_mask_requests_total", result="miss")
    assert len(PERSONAS) <= sum(loads.values()) <= len(PERSONAS) + 2
    assert min(loads.values()) > 0
    assert len(read_metric(server, "masquerade_ready")) == 2


def test_nine_of_ten_requests_reach_a_replica_that_has_their_persona(server: Server, client: OpenAI) -> None:
    """With eight clients at once, whose personas are drawn at random."""
    before = count_mask_requests(server)
    drawn = random.Random(0).choices(PERSONAS, k=200)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda persona: say(client, persona, tokens=4), drawn))
    hits, misses = (now - then for now, then in zip(count_mask_requests(server), before, strict=True))
    assert hits + misses == len(drawn)
    assert hits >= 0.9 * len(drawn)


def count_mask_requests(server: Server) -> list[float]:
    """Requests whose mask was on the device of their replica, and the others."""
    name = "masquerade_mask_requests_total"
    return [sum(read_metric(server, name, result=result).values()) for result in ("hit", "miss")]


def test_a_stream_arrives_token_by_token(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo:casual", messages=QUESTION, max_tokens=12, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 3
    assert "".join(parts) == say(client, "casual")


def test_a_client_that_leaves_ends_its_request(server: Server) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 8}
    with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: sum(read_metric(server, "masquerade_batch_requests").values()) == 0, 60)
    assert sum(read_metric(server, "masquerade_answers_total", reason="length", persona="_base").values()) == 0


def test_errors_are_those_of_a_server(server: Server) -> None:
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json={"model": "demo:nobody", "messages": QUESTION})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.headers["x-request-id"]
    large = httpx.post(f"{server.base_url}/v1/chat/completions", content=b" " * (2**23 + 1))
    assert large.status_code == 413


def test_jobs_are_the_same_wherever_they_are_asked_for(client: OpenAI) -> None:
    made = client.files.create(file=("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune")
    assert all(client.files.retrieve(made.id).filename == "a.jsonl" for _ in range(8))
    client.files.delete(made.id)


def test_a_deleted_persona_is_gone_everywhere(server: Server, client: OpenAI) -> None:
    say(client, "gloomy", tokens=1)
    assert httpx.delete(f"{server.base_url}/v1/personas/gloomy").is_success
    time.sleep(2)
    body = {"model": "demo", "persona": "gloomy", "messages": QUESTION, "max_tokens": 1}
    statuses = {httpx.post(f"{server.base_url}/v1/chat/completions", json=body).status_code for _ in range(8)}
    assert statuses == {404}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_replica_is_replaced_and_nothing_acknowledged_is_lost(
    server: Server, client: OpenAI, victim: int
) -> None:
    """One of the two runs the jobs. The streams of the other go on, and a batch is completed by whoever has it then."""
    names = list_personas(server)
    replicas = set(read_metric(server, "masquerade_ready"))
    with ThreadPoolExecutor(len(names)) as pool:
        streams = [pool.submit(stream, server, persona) for persona in names]
        wait_until(lambda: sum(read_metric(server, "masquerade_batch_requests").values()) == len(names))
        running = read_metric(server, "masquerade_batch_requests")
        batch = start_batch(client)
        alive = [pid for pid in find_pids(server) if Path(f"/proc/{pid}").exists()]
        os.kill(alive[victim], signal.SIGKILL)
        whole = sum(one.result() for one in streams)
    wait_until(lambda: len(set(read_metric(server, "masquerade_ready")) - replicas) == 1)
    (survivor,) = replicas & set(read_metric(server, "masquerade_ready"))
    assert whole >= running[survivor]
    assert list_personas(server) == names
    wait_until(lambda: client.batches.retrieve(batch).status == "completed")
    counts = client.batches.retrieve(batch).request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (3, 0)
    assert {say(client, persona, tokens=1) is not None for persona in names} == {True}


def list_personas(server: Server) -> list[str]:
    answer = httpx.get(f"{server.base_url}/v1/personas").raise_for_status().json()
    return [persona["id"] for persona in answer["data"]]


def stream(server: Server, persona: str) -> bool:
    """Stream an answer of seconds; whether it has its end."""
    body = {"model": f"demo:{persona}", "prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
    lines = []
    try:
        with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, timeout=120) as response:
            lines = [line for line in response.iter_lines() if line]
    except httpx.HTTPError:
        return False
    return lines[-1:] == ["data: [DONE]"]


def start_batch(client: OpenAI) -> str:
    """Three chats, to be done in the background."""
    line = '{{"custom_id": "{}", "method": "POST", "url": "/v1/chat/completions", "body": {}}}\n'
    body = json.dumps({"model": "demo", "messages": QUESTION, "max_tokens": 8})
    content = "".join(line.format(number, body) for number in range(3)).encode()
    file = client.files.create(file=("batch.jsonl", content), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    return made.id


def test_ray_answers_nobody_without_its_token(server: Server) -> None:
    lines = [Path(f"/proc/{process}/cmdline").read_text() for process in list_processes(server.process.pid)]
    address = next(found[1] for line in lines if (found := re.search(r"--gcs-address=([\d.:]+)", line)))
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [Path(sys.executable).with_name("ray"), "status", "--address", address]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "InvalidAuthToken" in ended.stdout + ended.stderr


def test_running_answers_complete_after_sigterm(server: Server, client: OpenAI) -> None:
    told: list[str | None] = []

    def listen() -> None:
        body = {"model": "demo", "prompt": "Once", "max_tokens": 450, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                told.append(line)  # noqa: PERF402 - the test reads them as they arrive

    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: bool(told))
    server.process.send_signal(signal.SIGTERM)
    begun = len(told)
    listener.join()
    assert len(told) > begun + 10
    assert told[-2] == "data: [DONE]"
    server.process.wait(120)
    assert "draining" in server.said()
    assert not any(Path(f"/proc/{pid}").exists() for pid in find_pids(server))
