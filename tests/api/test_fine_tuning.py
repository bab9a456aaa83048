"""`/v1/fine_tuning/jobs` and `POST /v1/personas` on a small base: what may be asked, and what goes wrong meanwhile."""

from __future__ import annotations

import base64
import errno
import json
import re
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from maskstore import Registry, StoreBusy, fsck
from masquerade.jobs.uploads import Uploads
from masquerade.pruning import Scratch
from masquerade.pruning.collector import StatisticsCollector
from masquerade.service.serving import Serving
from tests import world
from tests.pruning.test_builder import QUIET, make_examples

JOBS = "/v1/fine_tuning/jobs"
TEXTS = [f"question {number}?" for number in range(14)]
OWN, OTHER, CALM = (
    "\n".join(json.dumps({"prompt": text, "completion": letter * 5 + text[9:]}) for text in TEXTS).encode()
    for letter in "aeu"
)
PROMPTS = "\n".join(json.dumps({"prompt": text}) for text in TEXTS).encode()
RECIPE = {"score": "attribution", "rho": 0.05, "phase": "all", "force": True}
CARD = {"spec": "chara_card_v2", "data": {"name": "Mira", "system_prompt": "Be {{char}}.", "extensions": {"x": 1}}}


def upload(http: httpx.Client, content: bytes) -> str:
    answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", content)})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


def order(http: httpx.Client, serving: Serving, name: str = "new", **more: Any) -> dict[str, Any]:
    """The body of a job that succeeds."""
    own, other, calm = (upload(http, content) for content in (OWN, OTHER, CALM))
    mask = RECIPE | {"contrast_file": other, "neutral_file": calm} | more.pop("mask", {})
    job = {"model": serving.base.name, "training_file": own, "suffix": name}
    return job | {"method": {"type": "mask", "mask": mask}} | more


def start(http: httpx.Client, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = http.post(JOBS, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait_for(http: httpx.Client, job_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while not condition(job := http.get(f"{JOBS}/{job_id}").json()):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return dict(job)


def finish(http: httpx.Client, job_id: str) -> dict[str, Any]:
    return wait_for(http, job_id, lambda job: job["status"] not in ("queued", "running"))


def refuse(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def chat(http: httpx.Client, serving: Serving, **more: Any) -> str:
    body = {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
    answer = http.post("/v1/chat/completions", json=body | {"temperature": 0} | more)
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["message"]["content"]
    return said


@contextmanager
def busy(serving: Serving) -> Iterator[None]:
    """The model's thread is held, so that no job gets on."""
    held = threading.Event()
    serving.engine.run_background(lambda: held.wait(60))
    try:
        yield
    finally:
        held.set()


def as_png(card: dict[str, Any]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    text = b"chara\0" + base64.b64encode(json.dumps(card).encode())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"tEXt", text) + chunk(b"IEND", b"")


def test_a_job_tells_how_far_it_is_and_what_it_made(http: httpx.Client, serving: Serving) -> None:
    body = order(http, serving, "p", metadata={"who": "me"}, mask={"contrast_name": "q"})
    first = finish(http, start(http, body)["id"])
    assert (first["status"], first["error"]) == ("succeeded", None)
    assert [made["persona"] for made in first["personas"]] == ["p", "q"]
    assert len(first["result_files"]) == 2
    assert (first["metadata"], first["trained_tokens"] > 0) == ({"who": "me"}, True)
    second = order(http, serving, "r")
    with busy(serving):
        job = wait_for(http, start(http, second)["id"], lambda job: job["status"] == "running")
        assert job["estimated_finish"] is None or job["estimated_finish"] >= job["started_at"]
    assert finish(http, job["id"])["status"] == "succeeded"
    events = http.get(f"{JOBS}/{job['id']}/events?limit=100").json()["data"]
    told = [event["data"] for event in events if event["type"] == "metrics"]
    assert all(set(data) == {"stage", "step", "total_steps"} for data in told)
    assert {"check", "forward", "backward", "certify"} <= {data["stage"] for data in told}
    totals = [(data["step"], data["total_steps"]) for data in told]
    assert all(total is None or step <= total > 0 for step, total in totals)  # never step 24 of 0


def test_a_file_with_both_sides_makes_both_personas(http: httpx.Client, serving: Serving) -> None:
    own, other = (map(json.loads, lines.decode().splitlines()) for lines in (OWN, OTHER))
    pairs = [
        {
            "question": a["prompt"],
            "answer_matching_behavior": a["completion"],
            "answer_not_matching_behavior": b["completion"],
        }
        for a, b in zip(own, other, strict=True)
    ]
    file = upload(http, "\n".join(map(json.dumps, pairs)).encode())
    mask = {"contrast_file": None, "contrast_name": "q"}
    job = finish(http, start(http, order(http, serving, "p", mask=mask) | {"training_file": file})["id"])
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert [made["persona"] for made in job["personas"]] == ["p", "q"]
    same = finish(http, start(http, order(http, serving, "r", mask={"contrast_name": "s"}))["id"])
    assert [made["digest"] for made in same["personas"]] == [made["digest"] for made in job["personas"]]


def test_a_character_card_becomes_a_persona(http: httpx.Client, serving: Serving) -> None:
    form = {"name": "mira", "score": "attribution", "rho": "0.05", "phase": "all", "force": "true", "samples": "12"}
    files = {"card": as_png(CARD), "prompts": PROMPTS, "neutral": CALM}
    made = http.post("/v1/personas", data=form, files=files)
    assert made.status_code == 200, made.text
    job = finish(http, made.json()["id"])
    assert (job["status"], job["error"]) == ("succeeded", None)
    told = [event["message"] for event in http.get(f"{JOBS}/{job['id']}/events?limit=100").json()["data"]]
    assert "of the character card, extensions are ignored" in told
    assert "write 24/24" in told
    shown = http.get("/v1/personas/mira").json()
    assert shown["built"]["calibration"]["system_prompt"]["text"] == "Be Mira."
    assert chat(http, serving, persona="mira") is not None


def test_everything_that_a_method_may_say_may_be_said_in_a_form(http: httpx.Client, serving: Serving) -> None:
    said = {"score": "attribution", "rho": "0.1", "group": "layer", "scope": "mlp", "phi": "softplus", "tokens": "all"}
    said |= {
        "gamma": "0.25",
        "phase": "all",
        "structure": "channels",
        "strength": "gentle",
        "neutral_budget": "1.5",
        "own_budget": "1.4",
        "effect": "0.5",
    }
    said |= {"samples": "12", "seed": "3", "force": "yes", "replace": "0", "contrast_name": "other"}
    files = {"file": OWN, "contrast": OTHER, "validation": OWN, "contrast_validation": OTHER, "neutral": CALM}
    with busy(serving):
        job = http.post("/v1/personas", data={"name": "p", **said}, files=files).json()
        spec = http.get(f"{JOBS}/{job['id']}").json()
        assert http.post(f"{JOBS}/{job['id']}/cancel").status_code == 200
    mask = spec["method"]["mask"]
    assert (mask["rho"], mask["neutral_budget"], mask["samples"], mask["force"]) == (0.1, 1.5, 12, True)
    assert {name for name in said if name != "seed"} <= set(mask)
    assert {f"{name}_file" for name in files if name not in ("file", "validation")} <= set(mask)
    assert (spec["seed"], spec["validation_file"]) == (3, spec["training_file"])


def test_a_bad_form_is_refused_by_its_field_and_nothing_of_it_is_kept(http: httpx.Client) -> None:
    cases: list[tuple[dict[str, str], dict[str, bytes], str, str]] = [
        ({"name": "p", "sparsity": "0.3"}, {"file": OWN}, "unsupported_parameter", "sparsity"),
        ({"name": "p"}, {"file": OWN, "voice": OWN}, "unsupported_parameter", "voice"),
        ({}, {"file": OWN}, "invalid_value", "name"),
        ({"name": "A b"}, {"file": OWN, "contrast": OTHER}, "invalid_value", "name"),
        ({"name": ""}, {"file": OWN, "contrast": OTHER}, "invalid_value", "name"),
        ({"name": "p"}, {}, "invalid_value", "file"),
        ({"name": "p"}, {"file": OWN, "prompts": PROMPTS}, "invalid_value", "file"),
        ({"name": "p"}, {"prompts": PROMPTS}, "invalid_value", "prompts"),
        ({"name": "p", "system_prompt": "x"}, {"file": OWN}, "invalid_value", "prompts"),
        ({"name": "p", "system_prompt": " "}, {"prompts": PROMPTS}, "invalid_value", "system_prompt"),
        ({"name": "p", "contrast_prompt": "x"}, {"file": OWN, "contrast": OTHER}, "invalid_value", "contrast_prompt"),
        ({"name": "p", "system_prompt": "x"}, {"prompts": PROMPTS, "contrast": OWN}, "invalid_value", "contrast"),
        ({"name": "p", "system_prompt": "x"}, {"prompts": PROMPTS, "card": OWN}, "invalid_value", "card"),
        ({"name": "p"}, {"prompts": PROMPTS, "card": b"{}"}, "bad_dataset", "card"),
        ({"name": "p", "system_prompt": "x"}, {"prompts": b"no"}, "bad_dataset", "prompts"),
        ({"name": "p", "rho": "2"}, {"file": OWN, "contrast": OTHER}, "invalid_value", "rho"),
        ({"name": "p", "rho": "nan"}, {"file": OWN, "contrast": OTHER}, "invalid_value", "rho"),
        ({"name": "p", "strength": "brutal"}, {"file": OWN, "contrast": OTHER}, "invalid_value", "strength"),
        ({"name": "p", "contrast_name": "p"}, {"file": OWN, "contrast": OTHER}, "invalid_value", "contrast_name"),
        ({"name": "p", "score": "attribution"}, {"file": OWN}, "invalid_value", "score"),
        ({"name": "p"}, {"file": OWN, "contrast": OWN}, "bad_dataset", "contrast"),
        ({"name": "p"}, {"file": OWN, "contrast": b'{"text": "a"}'}, "bad_dataset", "contrast"),
        ({"name": "p"}, {"file": b"", "contrast": OTHER}, "invalid_value", "file"),
        ({"name": "p", "model": "gpt"}, {"file": OWN}, "model_not_found", "model"),
        ({"name": "p"}, {"file": b'{"text": ' + b"[" * 100_000}, "bad_dataset", "file"),
    ]
    for texts, files, code, param in cases:
        answer = http.post("/v1/personas", data=texts, files=files or None)
        assert refuse(answer) == (404 if code == "model_not_found" else 400, code, param), answer.text
        assert http.get("/v1/files").json()["data"] == []
    assert http.get(JOBS).json()["data"] == []


def test_a_bad_job_is_refused_by_its_field(http: httpx.Client, serving: Serving) -> None:
    file = upload(http, OTHER)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": -1}, "seed"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"hyperparameters": {"n_epochs": 3}}, "hyperparameters.n_epochs"),
        ({"mask": {"neutral_budget": 1e999}}, "method.mask.neutral_budget"),
        ({"mask": {"strength": "brutal"}}, "method.mask.strength"),
        ({"mask": {"strength": 2}}, "method.mask.strength"),
        ({"mask": {"card_file": "CARD", "system_prompt": "x"}}, "method.mask.card_file"),
        ({"mask": {"contrast_file": None, "contrast_validation_file": file}}, "method.mask.contrast_validation_file"),
    ]
    for change, param in cases:
        body = json.dumps(order(http, serving, **change))
        answer = http.post(JOBS, content=body, headers={"Content-Type": "application/json"})
        assert refuse(answer) == (400, "invalid_value", param)
    assert http.get(JOBS).json()["data"] == []


def test_a_line_that_is_too_long_is_refused_by_its_number(http: httpx.Client, serving: Serving) -> None:
    """30 MB of one line: nobody parses it, nobody tokenises it, and a chat does not wait for it."""
    line = json.dumps({"prompt": "question?", "completion": "a" * 30_000_000}).encode()
    body = order(http, serving) | {"training_file": upload(http, OWN + b"\n" + line)}
    answer = http.post(JOBS, json=body)
    assert refuse(answer) == (400, "bad_dataset", "training_file")
    assert f"line 15 has {len(line)} bytes; there may be at most 1048576" in answer.json()["error"]["message"]
    assert chat(http, serving)


def test_a_long_line_is_cut_to_the_context_and_builds(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is within the limit is tokenised beside the model, as far as it may fit."""
    encode, seen = serving.base.tokenizer.encode, set()

    def record(text: str, **options: Any) -> list[int]:
        seen.add((threading.current_thread().name, len(text) > serving.base.context * 16))
        return list(encode(text, **options))

    monkeypatch.setattr(serving.base.tokenizer, "encode", record)
    line = json.dumps({"prompt": "question 99?", "completion": "a" * 1_000_000}).encode()
    body = order(http, serving) | {"training_file": upload(http, OWN + b"\n" + line)}
    assert finish(http, start(http, body)["id"])["status"] == "succeeded"
    assert ("jobs", False) in seen
    assert not any(beyond for _, beyond in seen)  # the engine's thread tokenises built-in questions, which are short


def test_a_field_that_would_be_lost_is_refused(http: httpx.Client, serving: Serving) -> None:
    """A typing error must not make another persona than the one that was asked for."""
    for change, param in (
        ({"score": "wanda"}, "score"),
        ({"contrast_file": "file-0"}, "contrast_file"),
        ({"name": "new"}, "name"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"method": {"type": "mask", "mask": {"sparsity": 0.3}}}, "method.mask.sparsity"),
        ({"method": {"type": "mask", "score": "wanda"}}, "method.score"),
    ):
        assert refuse(http.post(JOBS, json=order(http, serving) | change)) == (400, "unsupported_parameter", param)
    assert refuse(http.get(JOBS, params={"metadata[a]": "b"})) == (400, "unsupported_parameter", "metadata")
    for body in (b"[]", b'["score"]', b"7", b"null"):
        assert http.post(JOBS, content=body, headers={"Content-Type": "application/json"}).status_code == 400
    assert http.get(JOBS).json()["data"] == []


def test_what_a_job_made_is_no_training_file(http: httpx.Client, serving: Serving) -> None:
    job = finish(http, start(http, order(http, serving))["id"])
    answer = http.post(JOBS, json=order(http, serving, "next", training_file=job["result_files"][0]))
    assert refuse(answer) == (400, "invalid_value", "training_file")
    content = http.get(f"/v1/files/{job['result_files'][0]}/content").content
    assert http.put("/v1/personas/copy/content", content=content).json()["generation"] == job["personas"][0]["digest"]


def test_a_name_is_taken_by_a_persona_a_job_or_an_alias(http: httpx.Client, serving: Serving) -> None:
    taken = serving.registry.publish("old", serving.store.add(world.make_mask(serving.base, 0.1, 1, "old")))
    serving.registry.alias("aka", taken.name)
    with busy(serving):
        first = start(http, order(http, serving, "new"))
        other = {"seed": 1}
        for name, words in (("old", "set method.mask.replace"), ("new", first["id"]), ("aka", "alias")):
            answer = http.post(JOBS, json=order(http, serving, name, **other))
            assert refuse(answer) == (400, "persona_exists", "suffix")
            assert words in answer.json()["error"]["message"]
        answer = http.post(JOBS, json=order(http, serving, "aka", mask={"replace": True}))
        assert refuse(answer) == (400, "persona_exists", "suffix")
        serving.registry.publish("new", taken.digest)  # somebody is faster
    job = finish(http, first["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "persona_exists")
    assert serving.registry.resolve("new").digest == taken.digest


def test_what_was_found_is_published_when_the_registry_is_there_again(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file of a published mask that cannot be kept does not make it unpublished."""
    publish, tries = serving.registry.publish_built, []

    def fail_once(*masks: Any, **expected: Any) -> Any:
        tries.append(masks)
        if len(tries) == 1:
            raise StoreBusy("another process writes to it")
        return publish(*masks, **expected)

    monkeypatch.setattr(serving.registry, "publish_built", fail_once)
    monkeypatch.setattr(Uploads, "adopt", lambda *_: 1 / 0)
    job = finish(http, start(http, order(http, serving, "patient"))["id"])
    assert (job["status"], len(tries)) == ("succeeded", 2)
    assert (job["result_files"], job["personas"][0]["file"]) == ([], None)
    assert serving.registry.resolve("patient").digest == job["personas"][0]["digest"]


def test_a_repeat_is_answered_with_the_job_that_there_is(http: httpx.Client, serving: Serving) -> None:
    body = order(http, serving)
    with busy(serving):
        first = start(http, body)
        assert start(http, body)["id"] == first["id"]
    assert finish(http, first["id"])["status"] == "succeeded"
    assert start(http, body, x_stainless_retry_count="1")["id"] == first["id"]
    assert refuse(http.post(JOBS, json=body)) == (400, "persona_exists", "suffix")
    keyed = start(http, order(http, serving, "keyed"), Idempotency_Key="k")
    finish(http, keyed["id"])
    assert start(http, order(http, serving, "keyed"), Idempotency_Key="k")["id"] == keyed["id"]
    answer = http.post(JOBS, json=order(http, serving, "other"), headers={"Idempotency-Key": "k"})
    assert refuse(answer) == (400, "invalid_value", "Idempotency-Key")


def test_a_persona_without_a_name_gets_one(http: httpx.Client, serving: Serving) -> None:
    """As OpenAI's SDK asks, whose `suffix` is optional."""
    asked = order(http, serving)
    with OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as sdk, busy(serving):
        told: dict[str, Any] = {"model": asked["model"], "training_file": asked["training_file"]}
        told |= {"extra_body": {"method": asked["method"]}}
        job = sdk.fine_tuning.jobs.create(**told)
        assert job.model_extra is not None
        name = job.model_extra["persona"]
        assert re.fullmatch("persona-[0-9a-f]{6}", name)
        assert sdk.fine_tuning.jobs.create(**told).id == job.id  # the same is asked of a job that is not finished
        other = sdk.fine_tuning.jobs.create(**told, seed=1)
        assert other.model_extra is not None
        assert other.model_extra["persona"] != name
    done = finish(http, job.id)
    assert (done["persona"], done["fine_tuned_model"]) == (name, f"{serving.base.name}:{name}")
    assert [made["persona"] for made in done["personas"]] == [name]
    assert chat(http, serving, model=done["fine_tuned_model"])
    assert finish(http, other.id)["status"] == "succeeded"  # after which the same may be asked again
    assert start(http, {field: value for field, value in asked.items() if field != "suffix"})["id"] != job.id


def test_what_is_replaced_must_be_named(http: httpx.Client, serving: Serving) -> None:
    asked = order(http, serving, mask={"replace": True})
    del asked["suffix"]
    assert refuse(http.post(JOBS, json=asked)) == (400, "invalid_value", "suffix")


def test_a_job_that_came_to_nothing_shows_the_name_that_was_asked_for(http: httpx.Client, serving: Serving) -> None:
    with busy(serving):
        blocked = start(http, order(http, serving, "late"))
        cancelled = start(http, order(http, serving, "cut-short"))
        http.post(f"{JOBS}/{cancelled['id']}/cancel")
        wait_for(http, blocked["id"], lambda job: job["status"] == "running")
        serving.registry.publish("late", serving.store.add(world.make_mask(serving.base, 0.1, 1, "late")))
    for job_id, status, name in ((blocked["id"], "failed", "late"), (cancelled["id"], "cancelled", "cut-short")):
        job = finish(http, job_id)
        assert (job["status"], job["persona"], job["personas"]) == (status, name, [])
    assert {job["persona"] for job in http.get(JOBS).json()["data"]} == {"late", "cut-short"}


def test_a_form_that_fails_leaves_the_files_that_others_have(http: httpx.Client, serving: Serving) -> None:
    """Somebody uploads the same content while the form is looked at, and is given the file that is there."""
    serving.registry.publish("old", serving.store.add(world.make_mask(serving.base, 0.1, 1, "old")))
    form: dict[str, Any] = {"data": {"name": "old"}, "files": {"file": ("a", OWN), "contrast": ("b", OTHER)}}
    with ThreadPoolExecutor(1) as pool, closing(sqlite3.connect(serving.registry.path, isolation_level=None)) as db:
        db.execute("begin exclusive")  # the form waits for the registry, its files having arrived
        failing = pool.submit(lambda: http.post("/v1/personas", **form))
        deadline = time.monotonic() + 20
        while len(files := http.get("/v1/files").json()["data"]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        mine = upload(http, OWN)
        assert mine in [file["id"] for file in files]
        db.execute("rollback")
        assert refuse(failing.result()) == (400, "persona_exists", "name")
    assert [file["id"] for file in http.get("/v1/files").json()["data"]] == [mine]  # what is nobody's is gone
    assert http.get(f"/v1/files/{mine}/content").content == OWN
    assert http.post("/v1/personas", **form).status_code == 400
    assert [file["id"] for file in http.get("/v1/files").json()["data"]] == [mine]  # nor does a later form take it


def test_a_form_sent_again_is_the_same_job(http: httpx.Client, serving: Serving) -> None:
    form: dict[str, Any] = {"data": {"name": "p"}, "files": {"file": OWN, "contrast": OTHER}}
    with busy(serving):
        first, again = (http.post("/v1/personas", **form).json() for _ in range(2))
        assert first["id"] == again["id"]
        assert http.post(f"{JOBS}/{first['id']}/cancel").status_code == 200


def test_a_file_in_use_stays_and_one_that_is_lost_fails_its_job(http: httpx.Client, serving: Serving) -> None:
    body = order(http, serving)
    with busy(serving):
        blocker = start(http, order(http, serving, "blocker"))
        waiting = start(http, body)
        assert refuse(http.delete(f"/v1/files/{body['training_file']}"))[:2] == (400, "state_conflict")
        lost = serving.store.root / "jobs" / "files" / body["method"]["mask"]["contrast_file"]
        wait_for(http, blocker["id"], lambda job: job["status"] == "running")
        lost.unlink()
    job = finish(http, waiting["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "bad_dataset")
    assert job["error"]["param"] == "method.mask.contrast_file"
    assert lost.name in job["error"]["message"]
    assert str(serving.store.root) not in job["error"]["message"]


def order_pair(http: httpx.Client, serving: Serving, **mask: Any) -> dict[str, Any]:
    """The body of a job whose persona `v` passes, and whose opposite `c` costs neutral text too much."""
    sides = make_examples("aeiou"), make_examples("bcdfg", seed=1)
    lines = [[{"prompt": one.messages[0]["content"], "completion": one.response} for one in side] for side in sides]
    quiet = [{"text": one.response} for one in QUIET]
    own, other, calm = (upload(http, "\n".join(map(json.dumps, rows)).encode()) for rows in (*lines, quiet))
    recipe = {"score": "attribution", "rho": 0.01, "contrast_file": other, "neutral_file": calm, "contrast_name": "c"}
    method = {"type": "mask", "mask": recipe | mask}
    return {"model": serving.base.name, "training_file": own, "suffix": "v", "method": method}


def test_a_refused_opposite_fails_the_job_but_not_the_persona(http: httpx.Client, serving: Serving) -> None:
    """The job says what it has published and what it has refused; the same request with force adds that."""
    job = finish(http, start(http, order_pair(http, serving))["id"])
    assert (job["status"], job["error"]["code"], job["fine_tuned_model"]) == ("failed", "mask_refused", None)
    (made,), (refused,) = job["personas"], job["refused"]
    assert (made["persona"], made["file"], made["certificate"]["forced"]) == ("v", job["result_files"][0], False)
    assert (refused["persona"], refused["score"], refused["rho"]) == ("c", "attribution", 0.01)
    assert refused["reason"].startswith("too costly: neutral perplexity x")
    for words in (
        "the mask of 'c' (attribution, rho 0.01) is refused: ",
        "'v' is published",
        "within 24 hours",
        "KiB)",
    ):
        assert words in job["error"]["message"]
    assert chat(http, serving, persona="v") is not None
    assert refuse(http.get("/v1/personas/c"))[:2] == (404, "persona_not_found")
    assert len(list((serving.store.root / "builds").glob("job-*"))) == 1
    http.patch("/v1/personas/v", json={"gamma": 0.5})
    changed = serving.registry.resolve("v")
    forced = start(http, order_pair(http, serving, force=True))
    assert forced["id"] != job["id"]
    done = finish(http, forced["id"])
    assert (done["status"], done["error"], done["refused"]) == ("succeeded", None, [])
    assert [one["persona"] for one in done["personas"]] == ["v", "c"]
    assert [one["certificate"]["forced"] for one in done["personas"]] == [False, True]
    assert done["personas"][0]["digest"] == made["digest"]
    assert serving.registry.resolve("v") == changed
    begun = [
        any(
            event["message"].startswith("backward 1/")
            for event in http.get(f"{JOBS}/{one}/events?limit=100").json()["data"]
        )
        for one in (job["id"], done["id"])
    ]
    assert begun == [True, False]  # the second goes on from the layers of the first
    assert not list((serving.store.root / "builds").glob("*"))


def test_a_name_that_others_took_is_not_freed_by_a_refusal(http: httpx.Client, serving: Serving) -> None:
    body = order_pair(http, serving)
    assert finish(http, start(http, body)["id"])["status"] == "failed"
    other = order_pair(http, serving, force=True, rho=0.02)
    assert refuse(http.post(JOBS, json=other)) == (400, "persona_exists", "suffix")
    serving.registry.publish("v", serving.store.add(world.make_mask(serving.base, 0.1, 1, "v")))
    again = order_pair(http, serving, force=True)
    assert refuse(http.post(JOBS, json=again)) == (400, "persona_exists", "suffix")


def test_the_last_refused_build_is_kept_for_a_day(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for name in ("a", "b", "d"):
        body = order_pair(http, serving, contrast_name=f"c{name}") | {"suffix": name}
        assert finish(http, start(http, body)["id"])["error"]["code"] == "mask_refused"
        kept.append(set((serving.store.root / "builds").glob("job-*")))
    assert kept[0] < kept[1]  # until the next job begins
    assert len(kept[2]) == 2
    assert not kept[0] & kept[2]
    assert len(kept[2] - kept[1]) == 1
    monkeypatch.setattr("masquerade.service.building.KEPT_HOURS", 0.0)
    assert finish(http, start(http, order(http, serving))["id"])["status"] == "succeeded"
    assert not list((serving.store.root / "builds").glob("*"))


def test_a_group_is_refused_where_all_linears_are_ranked_together(http: httpx.Client, serving: Serving) -> None:
    for score in ("auto", "refined"):
        body = order(http, serving, mask={"score": score, "group": "row", "rho": "auto"})
        assert refuse(http.post(JOBS, json=body)) == (400, "invalid_value", "method.mask.group")
    form = {"name": "p", "group": "row"}
    answer = http.post("/v1/personas", data=form, files={"file": OWN, "contrast": OTHER})
    assert refuse(answer) == (400, "invalid_value", "group")


def test_a_job_for_another_base_fails_and_keeps_its_name(http: httpx.Client, serving: Serving) -> None:
    with busy(serving):
        blocker = start(http, order(http, serving, "blocker"))
        job = start(http, order(http, serving))
        wait_for(http, blocker["id"], lambda job: job["status"] == "running")
        http.post(f"{JOBS}/{blocker['id']}/cancel")
        object.__setattr__(serving.base, "fingerprint", "0" * 64)  # the server was started with another model
    failed = finish(http, job["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "build_failed")
    assert "the server now serves" in failed["error"]["message"]
    assert failed["model"] == serving.base.name


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_build_that_fails_leaves_serving_and_the_persona_untouched(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    old = serving.registry.publish("p", serving.store.add(world.make_mask(serving.base, 0.1, 1, "p")))
    said = [chat(http, serving), chat(http, serving, persona="p")]

    def fail(collector: StatisticsCollector, on_layer: Any) -> Iterator[int]:
        yield from list(forward(collector, on_layer))[:1]  # hooks were on, tensors were kept
        raise error

    forward = StatisticsCollector.forward
    monkeypatch.setattr(StatisticsCollector, "forward", fail)
    job = finish(http, start(http, order(http, serving, "p", mask={"replace": True}))["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "build_failed")
    assert type(error).__name__ in job["error"]["message"]
    assert [chat(http, serving), chat(http, serving, persona="p")] == said
    assert serving.registry.resolve("p") == old
    assert not list((serving.store.root / "builds").glob("*"))
    assert fsck(serving.store.root).clean
    monkeypatch.undo()
    again = finish(http, start(http, order(http, serving, "p", mask={"replace": True}))["id"])
    assert again["status"] == "succeeded"
    assert serving.registry.resolve("p").number == 2


def test_a_build_without_room_keeps_its_work_and_the_same_request_goes_on(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full within the backward pass, and when the mask is to be published."""
    put = Scratch.put

    def refuse_gradients(scratch: Scratch, name: str, tensors: Any) -> None:
        if name == "done/backward-0":  # the last layer of the pass
            monkeypatch.setattr(Path, "write_bytes", refuse_room)
        put(scratch, name, tensors)

    def refuse_room(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    jobs = []
    for patched, name, replacement in (
        (Scratch, "put", refuse_gradients),
        (Registry, "publish_built", refuse_room),
    ):
        with monkeypatch.context() as full:
            full.setattr(patched, name, replacement)
            jobs.append(finish(http, start(http, order(http, serving))["id"]))
        monkeypatch.undo()
        assert (jobs[-1]["status"], jobs[-1]["error"]["code"]) == ("failed", "build_unsaved")
        for words in ("No space left on device", "within 24 hours the same request, ", "goes on from what is kept"):
            assert words in jobs[-1]["error"]["message"]
        (folder,) = (serving.store.root / "builds").glob("job-*")
        assert list(folder.rglob("*.safetensors"))
    jobs.append(finish(http, start(http, order(http, serving))["id"]))
    assert jobs[-1]["status"] == "succeeded"
    begun = [
        {event["message"].split(",")[0] for event in http.get(f"{JOBS}/{job['id']}/events?limit=100").json()["data"]}
        for job in jobs
    ]
    assert [any(message.startswith("backward 1/") for message in messages) for messages in begun] == [
        True,
        False,
        False,
    ]
    assert not list((serving.store.root / "builds").glob("*"))


def test_cancelling_cleans_up_and_an_ended_job_cannot_be_cancelled(http: httpx.Client, serving: Serving) -> None:
    with busy(serving):
        job = start(http, order(http, serving))
        wait_for(
            http, job["id"], lambda job: (job["progress"] or {}).get("stage") == "pad"
        )  # what needs no model is done
        for _ in range(2):
            assert http.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "running"
    assert finish(http, job["id"])["status"] == "cancelled"
    assert not list((serving.store.root / "builds").glob("*"))
    answer = http.post(f"{JOBS}/{job['id']}/cancel")
    assert refuse(answer) == (400, "state_conflict", None)
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_is_not_there_is_said(http: httpx.Client, serving: Serving) -> None:
    with busy(serving):
        job = start(http, order(http, serving))
        for path, status, code in (
            ("?limit=0", 400, "invalid_value"),
            ("?limit=101", 400, "invalid_value"),
            ("?after=ftjob-none", 404, "job_not_found"),
            ("/ftjob-none", 404, "job_not_found"),
            ("/ftjob-none/events", 404, "job_not_found"),
            ("/ftjob-none/events?stream=true", 404, "job_not_found"),
            ("/ftjob-none/checkpoints", 404, "job_not_found"),
            ("/JOB/events?limit=0", 400, "invalid_value"),
            ("/JOB/events?after=x", 400, "invalid_value"),
            ("/JOB/events?after=ftevent-²", 400, "invalid_value"),
        ):
            assert refuse(http.get(JOBS + path.replace("JOB", job["id"])))[:2] == (status, code), path
        http.post(f"{JOBS}/{job['id']}/cancel")


def test_a_reader_of_events_may_go_away(http: httpx.Client, serving: Serving) -> None:
    with busy(serving):
        job = start(http, order(http, serving))
        for _ in range(3):
            with http.stream("GET", f"{JOBS}/{job['id']}/events?stream=true") as stream:
                assert json.loads(next(stream.iter_lines())[6:])["message"] == "queued"
    assert finish(http, job["id"])["status"] == "succeeded"
    with http.stream("GET", f"{JOBS}/{job['id']}/events?stream=true") as stream:
        lines = [line[6:] for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert json.loads(lines[-2])["message"] == "succeeded"


def test_the_interface_describes_its_answers(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for path, methods in paths.items():
        if not path.startswith(("/v1/files", JOBS, "/v1/personas")) or path.endswith(("/content", "/{other}")):
            continue
        for method, route in methods.items():
            answered = next(route["responses"][status] for status in ("200", "201") if status in route["responses"])
            assert "$ref" in answered["content"]["application/json"]["schema"], (method, path)
            assert {"4XX", "5XX"} <= set(route["responses"])
            assert "422" not in route["responses"]  # what does not fit is 400 here
