"""What gateways read: load and residency under vLLM's names, load reports, OpenTelemetry's histograms."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from masquerade.engine import EngineConfig
from masquerade.http import metrics
from masquerade.http.gateway import OPERATIONS, Load
from masquerade.http.limits import Policy
from masquerade.model import VerifiedStore
from masquerade.service.serving import Serving
from tests.access.conftest import publish
from tests.cli.running import fail
from tests.contract.here import forbid_ends, serve_here, slow_down
from tests.docker.manifests import DOCKER, read_yaml
from tests.gateway.picker import Picker, read_endpoint
from tests.keys.making import bearer, make_key
from tests.serving import serve

POLICY = Policy(gateway_metrics=True)
FORMAT = "endpoint-load-metrics-format"
REPORT = "endpoint-load-metrics"
Here = tuple[Serving, httpx.Client]


@contextmanager
def serve_gateway(folder: Path, store: Path, *names: str, config: EngineConfig | None = None) -> Iterator[Here]:
    with serve_here(folder, store, config, POLICY) as (serving, http):
        publish(serving, *names)
        yield serving, http


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path) -> Iterator[Here]:
    with serve_gateway(tiny_folder, tmp_path / "store", "anna", "ben") as found:
        yield found


def samples(http: httpx.Client) -> list[tuple[str, dict[str, str], float]]:
    families = text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
    return [(sample.name, dict(sample.labels), sample.value) for family in families for sample in family.samples]


def value(http: httpx.Client, name: str, **labels: str) -> float:
    return sum(found for one, have, found in samples(http) if one == name and labels.items() <= have.items())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def body_of(path: str, serving: Serving, **fields: Any) -> dict[str, Any]:
    """A request that each of the routes takes."""
    body: dict[str, Any] = {"model": serving.base.name} | fields
    match path:
        case "/v1/embeddings":
            return body | {"input": "hi"}
        case "/v1/responses":
            return body | {"input": "hi", "max_output_tokens": 3}
        case "/v1/completions":
            return body | {"prompt": "hi", "max_tokens": 3}
        case _:
            return body | {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def ask(http: httpx.Client, serving: Serving, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    return http.post(path, json=body_of(path, serving, **fields))


@contextmanager
def asking(*requests: Callable[[], httpx.Response]) -> Iterator[list[httpx.Response]]:
    """Send requests from threads, which have been answered when the block ends."""
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda send=send: answers.append(send())) for send in requests]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        for thread in threads:
            thread.join(60)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Masks are read only after it is set."""
    opened, read = threading.Event(), VerifiedStore.read

    def read_later(self: VerifiedStore, digest: str) -> Any:
        opened.wait(60)
        return read(self, digest)

    monkeypatch.setattr(VerifiedStore, "read", read_later)
    yield opened
    opened.set()


def test_without_the_option_nothing_is_served(tiny_folder: Path, tmp_path: Path) -> None:
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):
        answer = http.post("/v1/completions", json=body_of("/v1/completions", serving), headers={FORMAT: "TEXT"})
        assert answer.status_code == 200
        assert REPORT not in answer.headers
        assert not [name for name, _, _ in samples(http) if name.startswith(("vllm:", "gen_ai_"))]


def test_our_own_metrics_stay(here: Here) -> None:
    serving, http = here
    ask(http, serving, persona="anna")
    assert value(http, "masquerade_answers_total", persona="anna") == 1
    assert value(http, "masquerade_first_token_seconds_count", persona="anna") == 1


def test_load_is_that_of_the_engine(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch)
    config = EngineConfig(max_running=1)
    with serve_gateway(tiny_folder, tmp_path / "store", config=config) as (serving, http):
        long = {"max_tokens": 40, "logit_bias": forbid_ends(serving)}
        path = "/v1/completions"
        send = lambda: http.post(path, json=body_of(path, serving) | long)  # noqa: E731
        with asking(send, send, send):
            wait_until(lambda: read_endpoint(http.get("/metrics").text).waiting == 2)
            text = http.get("/metrics").text
            busy = read_endpoint(text)
            assert (busy.waiting, busy.running) == (2, 1)
            assert 0 < busy.cache_usage < 1
            assert "masquerade_queue_requests 2.0\n" in text
        idle = read_endpoint(http.get("/metrics").text)
        assert (idle.waiting, idle.running, idle.cache_usage) == (0, 0, 0)
        pages = value(http, "masquerade_kv_pages")
        assert (idle.block_size, idle.blocks) == (16, pages)


def test_usage_and_utilisation_are_shares() -> None:
    load = Load(waiting=3, running=2, capacity=2, blocks_used=1, blocks=4)
    assert (load.cache_usage, load.utilisation) == (0.25, 2.5)


def test_resident_personas_have_the_names_of_requests(here: Here) -> None:
    serving, http = here
    serving.registry.alias("shy", "anna")
    before = read_endpoint(http.get("/metrics").text)
    assert (before.active, before.queued) == (frozenset(), frozenset())
    assert before.max_adapters >= 1
    name = f"{serving.base.name}:anna"
    assert ask(http, serving, model=name).json()["model"] == name
    after = read_endpoint(http.get("/metrics").text)
    assert after.active == {name, f"{serving.base.name}:shy"}  # idle, and still there
    assert after.max_adapters > len(after.active)
    assert ask(http, serving, model=f"{serving.base.name}:shy").status_code == 200


def test_a_persona_that_loads_is_waiting_and_not_running(here: Here, gate: threading.Event) -> None:
    serving, http = here
    name = f"{serving.base.name}:anna"
    with asking(lambda: ask(http, serving, model=name)) as answers:
        wait_until(lambda: serving.residency.waiting == 1)
        found = read_endpoint(http.get("/metrics").text)
        assert (found.active, found.queued) == (frozenset(), {name})
        assert found.waiting == 1  # it waits for its mask, outside the engine's queue
        gate.set()
    assert answers[0].status_code == 200
    found = read_endpoint(http.get("/metrics").text)
    assert (found.active, found.queued) == ({name}, frozenset())


def test_an_evicted_persona_leaves_the_list_and_no_series_is_left(here: Here) -> None:
    serving, http = here
    ask(http, serving, persona="anna")
    serving.residency.budget = serving.residency.nbytes  # room for one
    wait_until(lambda: ask(http, serving, persona="ben").status_code == 200)
    (series,) = [found for found in samples(http) if found[0] == "vllm:lora_requests_info"]
    _, labels, stamp = series
    assert labels == {
        "max_lora": "2",  # ben is idle, and would make room
        "running_lora_adapters": f"{serving.base.name}:ben",
        "waiting_lora_adapters": "",
    }
    assert stamp == pytest.approx(time.time(), abs=120)


def test_lists_never_share_a_name_while_masks_come_and_go(here: Here) -> None:
    serving, http = here
    names = [f"p{number}" for number in range(6)]
    publish(serving, *names)
    ask(http, serving, persona="p0")
    serving.residency.budget = 2 * serving.residency.nbytes
    personas = names * 3
    with asking(*(lambda name=name: ask(http, serving, persona=name) for name in personas)) as answers:  # type: ignore[misc]
        while len(answers) < len(personas):
            found = read_endpoint(http.get("/metrics").text)
            assert not found.active & found.queued
            assert len([one for one, _, _ in samples(http) if one == "vllm:lora_requests_info"]) == 1
    assert {answer.status_code for answer in answers} == {200}


def test_the_newest_series_wins() -> None:
    """The picker of these tests reads as the protocol says."""
    text = """
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="4",running_lora_adapters="m:old",waiting_lora_adapters=""} 10
vllm:lora_requests_info{max_lora="4",running_lora_adapters="m:a, m:b",waiting_lora_adapters="m:c"} 20
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting 1
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 2
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc 0.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1
"""
    found = read_endpoint(text)
    assert (found.active, found.queued) == ({"m:a", "m:b"}, {"m:c"})
    assert (found.waiting, found.running, found.cache_usage, found.blocks) == (1, 2, 0.5, 100)


def test_a_picker_sends_each_request_where_its_persona_is(tiny_folder: Path, tmp_path: Path) -> None:
    """Two servers, and the configuration in docker/gateway with the scores of llm-d's documents."""
    config = read_yaml(DOCKER / "gateway" / "picker.yaml")
    with ExitStack() as stack:
        both = [
            stack.enter_context(serve_gateway(tiny_folder, tmp_path / place, "anna", "ben", "cleo")) for place in "ab"
        ]
        servers = [http for _, http in both]
        for (serving, http), persona in zip(both, ("anna", "ben"), strict=True):
            assert ask(http, serving, persona=persona).status_code == 200
        picker = Picker(config, servers)
        base = both[0][0].base.name
        for prompt in ("one", "two " * 40, "three"):
            assert picker.pick(f"{base}:anna", prompt) == 0
            assert picker.pick(f"{base}:ben", prompt) == 1
        place = picker.pick(f"{base}:cleo", "four")
        assert ask(servers[place], both[place][0], model=f"{base}:cleo").status_code == 200
        assert picker.pick(f"{base}:cleo", "five") == place
        misses = [value(http, "masquerade_mask_requests_total", result="miss") for http in servers]
        assert sorted(misses) == [1, 2]


def test_a_picker_spares_a_server_with_a_queue(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch)
    config = EngineConfig(max_running=1)
    with (
        serve_gateway(tiny_folder, tmp_path / "a", config=config) as (serving, busy),
        serve_gateway(tiny_folder, tmp_path / "b") as (_, idle),
    ):
        picker = Picker(read_yaml(DOCKER / "gateway" / "picker.yaml"), [busy, idle])
        assert picker.pick(serving.base.name, "x") == 0  # equal
        long = body_of("/v1/completions", serving) | {"max_tokens": 40, "logit_bias": forbid_ends(serving)}
        send = lambda: busy.post("/v1/completions", json=long)  # noqa: E731
        with asking(send, send):
            wait_until(lambda: read_endpoint(busy.get("/metrics").text).waiting == 1)
            assert picker.pick(serving.base.name, "x") == 1


def parse_report(report: str) -> dict[str, float]:
    """A load report, by the names of ORCA's text form."""
    kind, _, content = report.partition(" ")
    if kind == "JSON":
        fields = json.loads(content)
        named = {f"named_metrics.{name}": found for name, found in fields.pop("named_metrics").items()}
        return {**fields, **named}
    assert kind == "TEXT"
    return {name.strip(): float(found) for name, found in (pair.split("=") for pair in content.split(","))}


@pytest.mark.parametrize("path", OPERATIONS)
@pytest.mark.parametrize("asked", ["TEXT", "JSON", "text", "json"])
def test_answers_carry_a_load_report_if_asked(here: Here, path: str, asked: str) -> None:
    serving, http = here
    answer = http.post(path, json=body_of(path, serving), headers={FORMAT: asked})
    assert answer.status_code == 200, answer.text
    assert answer.headers[REPORT].startswith(f"{asked.upper()} ")
    report = parse_report(answer.headers[REPORT])
    assert set(report) == {
        "application_utilization",
        "named_metrics.kv_cache_usage_perc",
        "named_metrics.num_requests_waiting",
        "named_metrics.num_requests_running",
    }
    assert report["named_metrics.num_requests_waiting"] == 0
    assert all(0 <= found <= 1 for found in report.values())


@pytest.mark.parametrize("headers", [{}, {FORMAT: ""}, {FORMAT: "BIN"}, {FORMAT: "TEXT, JSON"}])
def test_other_requests_get_no_load_report(here: Here, headers: dict[str, str]) -> None:
    serving, http = here
    answer = http.post("/v1/completions", json=body_of("/v1/completions", serving), headers=headers)
    assert answer.status_code == 200
    assert REPORT not in answer.headers
    assert REPORT not in http.get("/v1/models", headers={FORMAT: "TEXT"}).headers


@pytest.mark.parametrize("path", [path for path in OPERATIONS if path != "/v1/embeddings"])
def test_a_stream_reports_the_load_when_it_begins(here: Here, path: str) -> None:
    serving, http = here
    body = body_of(path, serving, stream=True)
    with http.stream("POST", path, json=body, headers={FORMAT: "JSON"}) as answer:
        report = parse_report(answer.headers[REPORT])  # before any of the body
        list(answer.iter_raw())
    assert answer.status_code == 200
    assert report["application_utilization"] >= 0


def test_a_refusal_reports_the_load_only_to_those_with_a_key(tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    token, _ = make_key(store, "chat")
    with serve_here(tiny_folder, store, policy=POLICY) as (serving, http):
        path = "/v1/chat/completions"
        body = body_of(path, serving)
        assert REPORT not in http.post(path, json=body, headers={FORMAT: "TEXT"}).headers
        headers = bearer(token) | {FORMAT: "TEXT"}
        refused = http.post(path, json=body | {"persona": "nobody"}, headers=headers)
        assert refused.status_code == 404
        assert REPORT in refused.headers
        assert http.get("/metrics", headers=bearer(token)).status_code == 403


LABELS = {"gen_ai_provider_name": "masquerade"}
DURATION, FIRST, TOKEN = (
    f"gen_ai_server_{name}_seconds" for name in ("request_duration", "time_to_first_token", "time_per_output_token")
)


@pytest.mark.parametrize(("path", "operation"), OPERATIONS.items())
def test_times_are_counted_by_operation_and_model(here: Here, path: str, operation: str) -> None:
    serving, http = here
    bias = {} if path in ("/v1/embeddings", "/v1/messages", "/v1/responses") else {"logit_bias": forbid_ends(serving)}
    greedy = {} if operation == "embeddings" else {"temperature": 0}  # a sampled answer may be empty
    for model in (serving.base.name, f"{serving.base.name}:anna"):
        assert ask(http, serving, path, model=model, **bias, **greedy).status_code == 200
        labels = LABELS | {"gen_ai_operation_name": operation, "gen_ai_request_model": model}
        assert value(http, f"{DURATION}_count", **labels, error_type="") == 1
        assert value(http, f"{FIRST}_count", **labels) == (0 if operation == "embeddings" else 1)
        if bias:
            first, each, whole = (value(http, f"{name}_sum", **labels) for name in (FIRST, TOKEN, DURATION))
            assert value(http, f"{TOKEN}_count", **labels) == 1
            assert first + 2 * each == pytest.approx(whole)


def test_the_time_of_a_token_is_that_of_an_answer_not_of_all_at_once(here: Here) -> None:
    serving, http = here
    asked = {"n": 4, "temperature": 0, "logit_bias": forbid_ends(serving)}
    assert ask(http, serving, "/v1/chat/completions", **asked).status_code == 200
    labels = LABELS | {"gen_ai_operation_name": "chat", "gen_ai_request_model": serving.base.name}
    first, each, whole = (value(http, f"{name}_sum", **labels) for name in (FIRST, TOKEN, DURATION))
    assert first + 2 * each == pytest.approx(whole)


def test_buckets_are_those_of_the_conventions(here: Here) -> None:
    serving, http = here
    ask(http, serving, "/v1/completions", logit_bias=forbid_ends(serving))
    found: dict[str, list[float]] = {}
    for name, labels, _ in samples(http):
        if name.startswith("gen_ai_") and "le" in labels:
            found.setdefault(name.removesuffix("_bucket"), []).append(float(labels["le"]))
    assert set(found) == {DURATION, FIRST, TOKEN}
    assert (found[DURATION][:3], found[DURATION][-2]) == ([0.01, 0.02, 0.04], 81.92)
    assert (found[FIRST][:3], found[FIRST][-2]) == ([0.001, 0.005, 0.01], 10)
    assert (found[TOKEN][:3], found[TOKEN][-2]) == ([0.01, 0.025, 0.05], 2.5)


def test_a_failure_counts_in_the_duration_with_its_code(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch)
    policy = Policy(gateway_metrics=True, answer_seconds=0.2)
    with serve_here(tiny_folder, tmp_path / "store", policy=policy) as (serving, http):
        path = "/v1/completions"
        body = body_of(path, serving) | {"max_tokens": 100, "logit_bias": forbid_ends(serving)}
        assert http.post(path, json=body).status_code == 504
        assert value(http, f"{DURATION}_count", error_type="answer_timeout") == 1
        assert value(http, f"{FIRST}_count") == value(http, f"{TOKEN}_count") == 0


def test_a_client_that_disconnects_is_no_success(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    serving, http = here
    slow_down(monkeypatch)
    path = "/v1/completions"
    body = body_of(path, serving, stream=True) | {"max_tokens": 100, "logit_bias": forbid_ends(serving)}
    with http.stream("POST", path, json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: value(http, f"{DURATION}_count", error_type="499") == 1)
    assert value(http, f"{FIRST}_count") == 0


def test_models_of_the_histograms_stay_few(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PERSONAS", 1)
    with serve_gateway(tiny_folder, tmp_path / "store", "anna", "ben", "cleo") as (serving, http):
        for persona, times in (("anna", 1), ("ben", 3), ("cleo", 1)):
            for _ in range(times):
                assert ask(http, serving, persona=persona).status_code == 200
        models = {labels["gen_ai_request_model"] for _, labels, _ in samples(http) if "gen_ai_request_model" in labels}
        assert models == {f"{serving.base.name}:{label}" for label in ("ben", metrics.OTHER)}


def test_the_command_has_the_option(tiny_folder: Path) -> None:
    with serve("--model", str(tiny_folder), "--gateway-metrics") as server:
        found = read_endpoint(httpx.get(f"{server.base_url}/metrics").text)
        assert (found.waiting, found.running, found.active) == (0, 0, frozenset())


def test_a_name_that_a_list_would_split_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--store", tmp_path / "store", "--port", "0", "--served-model-name", "a,b", "--gateway-metrics"]
    said = fail(2, "serve", "--model", tiny_folder, *options)
    assert "'a,b'" in said
    assert "--served-model-name" in said
