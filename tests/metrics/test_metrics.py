"""What is counted: the right numbers, and few labels whatever clients send."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from masquerade.http import metrics
from masquerade.http.metrics import BASE, OTHER, Labels, Metrics
from masquerade.http.request_log import RequestRecord
from masquerade.service.serving import ResolvedPersona, Serving
from tests.access.conftest import publish
from tests.contract.here import forbid_ends, serve_here


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path) -> Iterator[tuple[Serving, httpx.Client]]:
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):
        publish(serving, "anna", "ben")
        yield serving, http


@pytest.fixture
def serving(here: tuple[Serving, httpx.Client]) -> Serving:
    return here[0]


@pytest.fixture
def http(here: tuple[Serving, httpx.Client]) -> httpx.Client:
    return here[1]


Sample = Callable[..., float]


def read(http: httpx.Client) -> Sample:
    """The numbers as Prometheus reads them."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }

    def sample(name: str, **labels: str) -> float:
        return found.get((f"masquerade_{name}", frozenset(labels.items())), 0.0)

    return sample


def chat(http: httpx.Client, serving: Serving, **fields: Any) -> httpx.Response:
    body = {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    return http.post("/v1/chat/completions", json=body | {"logit_bias": forbid_ends(serving)} | fields)


def test_a_request_is_counted_with_its_tokens_and_times(http: httpx.Client, serving: Serving) -> None:
    usage = chat(http, serving, persona="anna").json()["usage"]
    chat(http, serving, n=2)
    found = read(http)
    route = "/v1/chat/completions"
    assert found("requests_total", method="POST", route=route, status="200") == 2
    assert found("tokens_total", persona="anna", kind="prompt") == usage["prompt_tokens"]
    assert found("tokens_total", persona="anna", kind="completion") == usage["completion_tokens"] == 5
    assert found("tokens_total", persona=BASE, kind="completion") == 10
    assert found("answers_total", persona="anna", reason="length") == 1
    assert found("answers_total", persona=BASE, reason="length") == 2
    for persona, gaps in (("anna", 4), (BASE, 8)):
        assert found("first_token_seconds_count", persona=persona) == 1
        assert found("inter_token_seconds_count", persona=persona) == gaps
        assert found("answer_seconds_count", persona=persona) == 1
        inside = found("first_token_seconds_sum", persona=persona) + found("inter_token_seconds_sum", persona=persona)
        assert 0 < inside <= 2 * found("answer_seconds_sum", persona=persona)  # two answers share the time of one


def test_a_stream_is_counted_alike(http: httpx.Client, serving: Serving) -> None:
    chat(http, serving, stream=True)
    found = read(http)
    assert found("tokens_total", persona=BASE, kind="completion") == 5
    assert found("inter_token_seconds_count", persona=BASE) == 4
    assert found("first_token_seconds_count", persona=BASE) == 1


def test_what_comes_from_the_cache_is_counted(http: httpx.Client, serving: Serving) -> None:
    long = [{"role": "user", "content": "again and again " * 6}]
    cached = [
        chat(http, serving, messages=long).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in "ab"
    ]
    found = read(http)
    assert cached[1] > 0
    assert found("tokens_total", persona=BASE, kind="cached") == sum(cached)
    assert found("engine_positions_total", source="cached") == sum(cached)
    assert found("engine_positions_total", source="computed") > 0
    assert found("kv_pages", state="kept") > 0


def test_failures_are_counted_by_code(http: httpx.Client, serving: Serving) -> None:
    chat(http, serving, persona="nobody")
    chat(http, serving, temperature=9)
    http.get("/nowhere")
    http.request("BREW", "/v1/models")
    found = read(http)
    assert found("errors_total", method="POST", code="persona_not_found") == 1
    assert found("errors_total", method="POST", code="invalid_value") == 1
    assert found("errors_total", method="GET", code="not_found") == 1
    assert found("requests_total", method="POST", route="/v1/chat/completions", status="404") == 1
    assert found("requests_total", method="GET", route="_other", status="404") == 1
    assert found("requests_total", method="_other", route="/v1/models", status="405") == 1


def test_a_client_that_goes_away_is_counted(http: httpx.Client, serving: Serving) -> None:
    with http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": serving.base.name,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 200,
            "stream": True,
        },
    ) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while not (found := read(http))("answer_seconds_count", persona=BASE) or found("batch_requests"):
        assert time.monotonic() < deadline  # the engine lets go of it after the step that runs
        time.sleep(0.02)
    assert read(http)("batch_requests") == 0


def test_what_the_engine_and_the_masks_are_doing(http: httpx.Client, serving: Serving) -> None:
    chat(http, serving, persona="anna")
    chat(http, serving, persona="anna")
    found = read(http)
    assert found("ready") == 1
    assert (found("queue_requests"), found("batch_requests"), found("batch_personas")) == (0, 0, 0)
    assert found("batch_capacity_requests") == serving.engine.config.max_running
    pages = sum(found("kv_pages", state=state) for state in ("held", "kept", "blank"))
    assert pages == serving.engine._block_manager.num_blocks
    assert found("engine_steps_total") == serving.engine.counts.steps > 0
    assert found("engine_sampled_tokens_total") == serving.engine.counts.sampled == 10
    assert (found("personas", tier="device"), found("personas", tier="disk")) == (1, 1)
    assert found("mask_bytes", tier="device") == serving.residency.nbytes > 0
    assert (found("mask_requests_total", result="miss"), found("mask_requests_total", result="hit")) == (1, 1)
    assert found("cold_loads_total", source="disk") == 1
    assert found("jobs", state="running") == 0
    labels = {"base": serving.base.name, "fingerprint": serving.base.fingerprint, "device": "cpu"}
    assert found("info", **labels, version=metrics.__version__) == 1


def run_batch(http: httpx.Client, content: bytes, status: str) -> None:
    """Run a batch of chats until it has a status."""
    file = http.post("/v1/files", files={"file": ("x.jsonl", content)}, data={"purpose": "batch"}).json()["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = http.post("/v1/batches", json=asked).json()["id"]
    deadline = time.monotonic() + 60
    while http.get(f"/v1/batches/{batch}").json()["status"] != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_embeddings_are_no_answers(http: httpx.Client, serving: Serving) -> None:
    asked = {"model": serving.base.name, "input": ["one", "two"]}
    assert http.post("/v1/embeddings", json=asked).status_code == 200
    found = read(http)
    assert found("answers_total", persona=BASE, reason="stop") in (None, 0)
    assert found("answer_seconds_count", persona=BASE) == 0
    assert found("tokens_total", persona=BASE, kind="prompt") > 0


def test_lines_of_batches_are_no_http_requests(http: httpx.Client, serving: Serving) -> None:
    body = {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    lines = [
        {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": body | change}
        for number, change in enumerate(({}, {"persona": "nobody"}))
    ]
    run_batch(http, "".join(f"{json.dumps(line)}\n" for line in lines).encode(), "completed")
    found = read(http)
    assert found("requests_total", method="POST", route="/v1/chat/completions", status="200") in (None, 0)
    assert found("errors_total", method="POST", code="persona_not_found") in (None, 0)
    assert found("tokens_total", persona=BASE, kind="prompt") > 0


def test_batches_are_counted_by_state(http: httpx.Client) -> None:
    assert read(http)("batches", state="in_progress") == 0
    run_batch(http, b"{}", "failed")
    found = read(http)
    assert (found("batches", state="failed"), found("batches", state="completed")) == (1, 0)


def test_every_name_says_whose_it_is_and_in_what_unit(http: httpx.Client, serving: Serving) -> None:
    chat(http, serving)
    for family in text_string_to_metric_families(http.get("/metrics").text):
        assert family.name.startswith(("masquerade_", "process_")), family.name
        assert family.documentation
        assert not family.name.endswith(("_ms", "_mb", "_percent", "_milliseconds"))


def test_series_stay_few_whatever_is_sent(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PERSONAS", 3)
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):
        names = [f"p{number}" for number in range(8)]
        digest = None
        for name in names:
            publish(serving, name)
            digest = digest or serving.registry.resolve(name).digest
        for name in names:
            assert chat(http, serving, persona=name).status_code == 200
            chat(http, serving, persona=f"no-{name}")
            http.request(f"M{name.upper()}", f"/x/{name}")
            http.get(f"/v1/models/{name}")
        text = http.get("/metrics").text
        labelled = {
            sample.labels["persona"]
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "persona" in sample.labels
        }
        assert labelled == {"p0", "p1", "p2", OTHER}
        assert "no-p" not in text
        assert "MP0" not in text
        assert read(http)("answers_total", persona=OTHER, reason="length") == 5


@settings(deadline=None, max_examples=80)
@given(st.lists(st.sampled_from([f"p{number}" for number in range(9)]), max_size=300))
def test_labels_go_to_those_used_most(uses: list[str]) -> None:
    dropped: list[str] = []
    labels = Labels(3, dropped.append)
    given_out = [labels.find(name) for name in uses]
    current = {name for name in uses if labels.current(name) == name}
    assert len(current) <= 3
    assert all(label in (name, OTHER) for label, name in zip(given_out, uses, strict=True))
    counts = {name: uses.count(name) for name in uses}
    if len(current) == 3:
        least = min(counts[name] for name in current)
        assert all(counts[name] < 2 * least + 2 for name in counts if name not in current)
    assert labels.current(None) == labels.find(None) == BASE


def test_a_persona_that_is_used_much_more_takes_over_a_label() -> None:
    dropped: list[str] = []
    labels = Labels(1, dropped.append)
    assert [labels.find("old") for _ in range(3)] == ["old"] * 3
    assert [labels.find("new") for _ in range(7)] == [OTHER] * 5 + ["new"] * 2
    assert dropped == ["old"]
    assert labels.find("old") == OTHER


def test_series_of_a_label_that_went_are_gone(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PERSONAS", 1)
    counted = Metrics(serving, lambda: None)
    for name, times in (("old", 1), ("new", 3)):
        for _ in range(times):
            record = RequestRecord(counted, "id", "POST")
            record.begin(ResolvedPersona("m", name), lambda: metrics_usage())
            record.add_token(0, record.started + 0.5)
            record.end_answer("stop")
            record.close()
    text = counted.render().decode()
    assert 'persona="new"' in text
    assert 'persona="old"' not in text


def metrics_usage() -> Any:
    from masquerade.http.request_log import Usage

    return Usage(3, 1)
