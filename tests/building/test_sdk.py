"""The stock OpenAI SDK builds a persona on a real server, while others chat with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import OpenAI

from maskstore import fsck
from masquerade import demo
from masquerade.demo.judge import DemoJudge
from tests.building.asking import QUICK, RECIPE, ask, build, connect, finish, order, upload
from tests.serving import Server, serve

TRAIN, OTHER = demo.DATA / "formal.train.jsonl", demo.DATA / "casual.train.jsonl"
FACTS = demo.DATA / "facts.jsonl"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("building") / "store"


@pytest.fixture(scope="module")
def running(store: Path) -> Iterator[Server]:
    with serve("--model", "demo", "--store", str(store)) as server:
        yield server


@pytest.fixture(scope="module")
def sdk(running: Server) -> Iterator[OpenAI]:
    with connect(running) as client:
        yield client


@pytest.fixture(scope="module")
def built(sdk: OpenAI) -> Any:
    """A job that has made a pair of opposites."""
    return finish(sdk, build(sdk, "stiff", contrast_name="loose", scope="all", samples=128).id)


def test_a_persona_is_built_and_used_in_the_next_request(sdk: OpenAI, store: Path, built: Any) -> None:
    assert (built.status, built.fine_tuned_model, built.error) == ("succeeded", "demo:stiff", None)
    assert {"demo:stiff", "demo:loose"} <= {model.id for model in sdk.models.list()}
    judge = DemoJudge()
    assert [judge.attribute(ask(sdk, f"demo:{name}")) for name in ("stiff", "loose")] == ["formal", "casual"]
    checkpoints = sdk.fine_tuning.jobs.checkpoints.list(built.id).data
    assert [point.fine_tuned_model_checkpoint.partition("@")[0] for point in checkpoints] == [
        "demo:stiff",
        "demo:loose",
    ]
    assert ask(sdk, checkpoints[0].fine_tuned_model_checkpoint) == ask(sdk, "demo:stiff")
    assert fsck(store).clean
    assert not list((store / "builds").glob("*"))


def test_events_tell_the_stages_in_order(sdk: OpenAI, running: Server, built: Any) -> None:
    told = [event.message for event in sdk.fine_tuning.jobs.list_events(built.id, limit=100)][::-1]
    assert told[:2] == ["queued", "running"]
    assert told[-1] == "succeeded"
    with httpx.stream("GET", f"{running.base_url}/v1/fine_tuning/jobs/{built.id}/events?stream=true") as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data")]
    assert lines[-1] == "[DONE]"
    assert [json.loads(line)["message"] for line in lines[:-1]] == told


def test_a_page_of_events_goes_on_behind_the_last_one(sdk: OpenAI, built: Any) -> None:
    paged = [event.id for event in sdk.fine_tuning.jobs.list_events(built.id, limit=2)]  # the SDK turns the pages
    assert paged == [event.id for event in sdk.fine_tuning.jobs.list_events(built.id, limit=100)]


def test_chat_goes_on_and_stays_exact_while_a_persona_is_built(sdk: OpenAI) -> None:
    models = ["demo", "demo:formal", "demo:casual", "demo:gloomy"]
    before = [ask(sdk, model) for model in models]
    job = build(sdk, "busy", **QUICK)
    with ThreadPoolExecutor(4) as pool:
        while sdk.fine_tuning.jobs.retrieve(job.id).status != "succeeded":
            assert list(pool.map(lambda model: ask(sdk, model), models)) == before
            time.sleep(0.2)  # the build runs while nobody chats
    assert finish(sdk, job.id).status == "succeeded"


def test_a_running_job_can_be_cancelled_and_an_ended_one_cannot(sdk: OpenAI) -> None:
    first, second = build(sdk, "one"), build(sdk, "two")
    assert sdk.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    sdk.fine_tuning.jobs.cancel(first.id)
    assert finish(sdk, first.id).status in ("cancelled", "succeeded")
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.fine_tuning.jobs.cancel(second.id)
    assert refusal.value.code == "state_conflict"


def test_one_form_uploads_and_builds(sdk: OpenAI, running: Server) -> None:
    form = {"name": "formed", "contrast_name": "unformed", "score": "attribution", "rho": "0.004", "phase": "all"}
    form |= {name: json.dumps(value) for name, value in QUICK.items()}
    files = {"file": TRAIN.read_bytes(), "contrast": OTHER.read_bytes(), "neutral": FACTS.read_bytes()}
    made = httpx.post(f"{running.base_url}/v1/personas", data=form, files=files, timeout=60)
    assert made.status_code == 200, made.text
    job = finish(sdk, made.json()["id"])
    assert (job.status, job.fine_tuned_model) == ("succeeded", "demo:formed")
    made = httpx.get(f"{running.base_url}/v1/personas/formed").json()
    assert (made["phase"], made["built"]["opposite"], made["built"]["parameters"]["rho"]) == ("all", "unformed", 0.004)


def test_a_system_prompt_becomes_a_persona_that_needs_no_prompt(sdk: OpenAI, running: Server) -> None:
    questions = [json.loads(line)["messages"][-2]["content"] for line in TRAIN.read_text().splitlines()[:40]]
    prompts = "\n".join(json.dumps({"prompt": question}) for question in questions)
    asked = sdk.files.create(file=("prompts.jsonl", prompts.encode()), purpose="fine-tune").id
    mask = RECIPE | {"system_prompt": "You are casual.", "phase": "all", "neutral_file": upload(sdk, "facts")[0]}
    job = finish(sdk, order(sdk, "easygoing", asked, mask).id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.trained_tokens > 0
    assert DemoJudge().attribute(ask(sdk, "demo:easygoing")) == "casual"
    told = [event.message for event in sdk.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]
    assert [message for message in told if message.startswith("write")][-1] == "write 80/80"
    built = httpx.get(f"{running.base_url}/v1/personas/easygoing").json()["built"]
    assert built["calibration"]["system_prompt"]["text"] == "You are casual."


def test_the_mask_is_a_file_of_the_job(sdk: OpenAI, running: Server, built: Any) -> None:
    for file_id, name in zip(built.result_files, ("stiff", "loose"), strict=True):
        mask = sdk.files.content(file_id).read()
        assert mask == httpx.get(f"{running.base_url}/v1/personas/{name}/content").content
        file = sdk.files.retrieve(file_id)
        assert (file.purpose, file.filename, file.bytes) == ("fine-tune-results", f"{name}.safetensors", len(mask))


def test_a_retry_of_the_sdk_makes_no_second_job(sdk: OpenAI, running: Server) -> None:
    """The first answer is lost on its way back; the SDK asks again by itself."""
    jobs = len(sdk.fine_tuning.jobs.list(limit=100).data)
    lost: list[str] = []

    class Losing(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().handle_request(request)
            if request.url.path.endswith("/fine_tuning/jobs") and request.method == "POST" and not lost:
                lost.append(answer.read().decode())
                raise httpx2.ReadError("the connection broke")
            return answer

    with httpx2.Client(transport=Losing()) as http, connect(running, max_retries=2, http_client=http) as retrying:
        job = build(retrying, "lost-and-found")
    assert json.loads(lost[0])["id"] == job.id
    assert len(sdk.fine_tuning.jobs.list(limit=100).data) == jobs + 1
    sdk.fine_tuning.jobs.cancel(job.id)


def test_files_are_kept_listed_read_and_deleted(sdk: OpenAI) -> None:
    file = sdk.files.create(file=("notes.jsonl", b'{"text": "hello"}'), purpose="fine-tune")
    assert (file.bytes, file.filename, file.status) == (17, "notes.jsonl", "processed")
    assert file.id in [one.id for one in sdk.files.list()]
    assert sdk.files.content(file.id).read() == b'{"text": "hello"}'
    assert sdk.files.create(file=("notes.jsonl", b'{"text": "hello"}'), purpose="fine-tune").id == file.id
    assert sdk.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as refusal:
        sdk.files.retrieve(file.id)
    assert refusal.value.code == "file_not_found"


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"training_file": "file-none"}, 404, "file_not_found", "training_file"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": "demo:formal"}, 400, "unsupported_parameter", "model"),
        ({"suffix": "a/b"}, 400, "invalid_value", "suffix"),
        ({"suffix": "formal"}, 400, "persona_exists", "suffix"),
        ({"method": {"type": "supervised"}}, 400, "invalid_value", "method.type"),
        ({"mask": {"score": "magic"}}, 400, "invalid_value", "method.mask.score"),
        ({"mask": {"rho": 2.0}}, 400, "invalid_value", "method.mask.rho"),
        ({"mask": {"sparsity": 0.5}}, 400, "unsupported_parameter", "method.mask.sparsity"),
        ({"mask": {"contrast_file": "SAME"}}, 400, "bad_dataset", "method.mask.contrast_file"),
        ({"mask": {"contrast_name": "x"}, "no_contrast": True}, 400, "invalid_value", "method.mask.contrast_name"),
        ({"training_file": "BROKEN"}, 400, "bad_dataset", "training_file"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_queued(
    sdk: OpenAI, running: Server, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    ids = [sdk.files.create(file=path, purpose="fine-tune").id for path in (TRAIN, OTHER)]
    broken = sdk.files.create(file=("broken.jsonl", b'{"text": "a"}\n{"prompt"\n'), purpose="fine-tune").id
    words = {"SAME": ids[0], "BROKEN": broken}
    mask = RECIPE | ({} if change.pop("no_contrast", False) else {"contrast_file": ids[1]}) | change.pop("mask", {})
    mask = {key: words.get(value, value) if isinstance(value, str) else value for key, value in mask.items()}
    body = {"model": "demo", "training_file": ids[0], "suffix": "fresh", "method": {"type": "mask", "mask": mask}}
    body |= {key: words.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
    jobs = len(sdk.fine_tuning.jobs.list(limit=100).data)
    refused = httpx.post(f"{running.base_url}/v1/fine_tuning/jobs", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (status, code, param), error
    assert str(running.log.parent) not in error["message"]
    assert len(sdk.fine_tuning.jobs.list(limit=100).data) == jobs


def test_uploads_of_another_kind_are_refused(sdk: OpenAI, running: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.files.create(file=("a", b"x"), purpose="assistants")
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "purpose")
    for body in ({"data": {"purpose": "fine-tune"}}, {"json": {}}):
        refused = httpx.post(f"{running.base_url}/v1/files", **body)  # type: ignore[arg-type]
        assert refused.status_code == 400, refused.text
