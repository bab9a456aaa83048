"""On a quantised base a persona is served if it was measured there; otherwise only with a flag and a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from maskstore import Mask, Measurement, write_mask
from maskstore.mask import now
from masquerade.app import create_app
from masquerade.service.serving import Serving
from tests import world
from tests.api.test_personas import chat, refuse
from tests.contract.here import listen

REMEDY = "it was not measured on nf4 weights; `masquerade masks certify calm --quantization nf4` does that"


@contextmanager
def on(serving: Serving, quantization: str | None, accept: bool = False) -> Iterator[httpx.Client]:
    """A server whose base says that it is quantised so; the rule looks at nothing else."""
    base = replace(serving.base, quantization=quantization)
    with listen(create_app(replace(serving, base=base, accept_uncertified=accept))) as client:
        yield client


def make(serving: Serving, measured_on: str | None = None, name: str = "calm") -> Mask:
    certificate = {"passed": True} | ({"quantization": measured_on} if measured_on else {})
    mask = world.make_mask(serving.base, 0.05, 7, name)
    return replace(mask, info=replace(mask.info, certificate=certificate))


def measure(serving: Serving, digest: str, quantization: str | None, **figures: Any) -> None:
    serving.registry.record(Measurement(digest, figures, 0.0, "all", {}, now(), quantization))


def ask(http: httpx.Client, serving: Serving, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    said = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    return http.post(path, json={"model": serving.base.name, "max_tokens": 2} | said | more)


def test_a_mask_of_the_unquantised_base_waits_for_its_certificate(serving: Serving) -> None:
    digest = serving.registry.publish_built(make(serving))[0].digest
    with on(serving, "nf4") as http:
        (listed,) = http.get("/v1/personas").json()["data"]
        assert (listed["served"], listed["warning"]) == (False, REMEDY)
        shown = http.get("/v1/personas/calm").json()
        assert (shown["served"], shown["certificate_source"], shown["measurement"]) == (False, "claimed", None)
        assert [one["id"] for one in http.get("/v1/models").json()["data"]] == [serving.base.name]
        assert http.get(f"/v1/models/{serving.base.name}:calm").status_code == 404
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            answer = ask(http, serving, path, model=f"{serving.base.name}:calm")
            assert answer.status_code == 404, path
            assert REMEDY in answer.json()["error"]["message"]
            assert "--accept-uncertified" in answer.json()["error"]["message"]
        assert refuse(ask(http, serving, persona="calm")) == (404, "persona_not_found")
        assert refuse(ask(http, serving, persona=f"calm@{digest[:8]}", gamma=1)) == (404, "persona_not_found")
        assert http.post("/tokenize", json={"model": f"{serving.base.name}:calm", "prompt": "x"}).status_code == 404

        measure(serving, digest, "nf4", passed=True, flip=0.5)  # while the server runs
        assert ask(http, serving, persona="calm").status_code == 200
        shown = http.get("/v1/personas/calm").json()
        assert (shown["served"], shown["warning"], shown["certificate"]["flip"]) == (True, None, 0.5)
        assert (shown["certificate_source"], shown["measurement"]["quantization"]) == ("measured", "nf4")
        assert len(http.get("/v1/models").json()["data"]) == 2


@pytest.mark.parametrize(("served_on", "status"), [("int8", 200), ("nf4", 404), (None, 200)])
def test_a_measurement_counts_on_its_own_quantisation(serving: Serving, served_on: str | None, status: int) -> None:
    digest = serving.registry.publish_built(make(serving))[0].digest
    measure(serving, digest, "int8", passed=True)
    with on(serving, served_on) as http:
        assert ask(http, serving, persona="calm").status_code == status


def test_a_refusal_there_is_none_of_too_few_pairs(serving: Serving) -> None:
    digest = serving.registry.publish_built(make(serving))[0].digest
    measure(serving, digest, "nf4", passed=False, reasons=["too costly: neutral perplexity"])
    with on(serving, "nf4") as http:
        message = ask(http, serving, persona="calm").json()["error"]["message"]
        assert "its certificate on nf4 weights is a refusal: too costly: neutral perplexity" in message
        measure(serving, digest, "nf4", passed=None, reasons=[])
        assert ask(http, serving, persona="calm").status_code == 200
        measure(serving, digest, "nf4", passed=False, reasons=[])
        assert refuse(ask(http, serving, persona="calm")) == (404, "persona_not_found")


def test_the_flag_serves_it_with_a_warning(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    digest = serving.registry.publish_built(make(serving))[0].digest
    with on(serving, "nf4", accept=True) as http, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ask(http, serving, persona="calm").status_code == 200
        logged = [one for one in caplog.messages if "served without a certificate" in one]
        assert logged == [f"the persona calm is served without a certificate: {REMEDY}"]
        for one in (http.get("/v1/personas").json()["data"][0], http.get("/v1/personas/calm").json()):
            assert (one["served"], one["warning"]) == (True, REMEDY)
        assert len(http.get("/v1/models").json()["data"]) == 2
        measure(serving, digest, "nf4", passed=True)
        assert http.get("/v1/personas/calm").json()["warning"] is None


def test_what_was_built_on_the_quantised_base_waits_on_the_unquantised_one(serving: Serving) -> None:
    serving.registry.publish_built(make(serving, "nf4"))
    with on(serving, "nf4") as http:
        assert ask(http, serving, persona="calm").status_code == 200
        assert http.get("/v1/personas/calm").json()["measurement"]["quantization"] == "nf4"
    with on(serving, None) as http:
        message = ask(http, serving, persona="calm").json()["error"]["message"]
        assert "it was not measured on unquantised weights; `masquerade masks certify calm` does that" in message


def test_an_import_and_a_composition_say_so_at_once(serving: Serving, tmp_path: Path) -> None:
    write_mask(make(serving), tmp_path / "m")
    with on(serving, "nf4") as http:
        answer = http.put("/v1/personas/calm/content", content=(tmp_path / "m").read_bytes())
        assert (answer.status_code, answer.json()["served"], answer.json()["warning"]) == (201, False, REMEDY)
        answer = http.post("/v1/personas/compose", json={"name": "still", "expression": "calm"})
        assert (answer.status_code, answer.json()["served"]) == (201, False)


def test_on_the_unquantised_base_nothing_changes(http: httpx.Client, serving: Serving) -> None:
    mask = world.make_mask(serving.base, 0.05, 7, "calm")  # without a certificate
    serving.registry.publish("calm", serving.store.add(mask))
    assert chat(http, serving, persona="calm")["persona"] == "calm"
    shown = http.get("/v1/personas/calm").json()
    assert (shown["served"], shown["warning"], shown["certificate_source"]) == (True, None, None)
