"""Batches through the stock SDK: every line gets the result that its route gives, once, whatever happens meanwhile."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from masquerade.generation.prompts import INLINE_BYTES
from masquerade.jobs.batches import WINDOW_SECONDS
from masquerade.keys.table import KeyTable
from tests.contract.asking import CHAT, PARTY, QUESTIONS, Api, Json, body, error_of
from tests.contract.here import serve_here
from tests.keys.making import make_key
from tests.serving import serve

COMPLETIONS, RESPONSES, EMBEDDINGS = "/v1/completions", "/v1/responses", "/v1/embeddings"
ROUTE = "/v1/batches"
ENDED = ("failed", "completed", "expired", "cancelled")
SECONDS = 120


def line(custom_id: str, content: Json, url: str = CHAT) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": content}


def write(lines: list[Json]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


def upload(sdk: OpenAI, lines: list[Json] | bytes) -> str:
    content = lines if isinstance(lines, bytes) else write(lines)
    return sdk.files.create(file=("requests.jsonl", content), purpose="batch").id


def create(sdk: OpenAI, lines: list[Json] | bytes, endpoint: str = CHAT, **more: Any) -> Any:
    options: Any = {"endpoint": endpoint, "completion_window": "24h"} | more
    return sdk.batches.create(input_file_id=upload(sdk, lines), **options)


def wait_for(sdk: OpenAI, batch_id: str, reached: Callable[[Any], bool] = lambda batch: batch.status in ENDED) -> Any:
    deadline = time.monotonic() + SECONDS
    while not reached(batch := sdk.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def finish(sdk: OpenAI, lines: list[Json] | bytes, endpoint: str = CHAT) -> Any:
    return wait_for(sdk, create(sdk, lines, endpoint).id)


def results(sdk: OpenAI, file_id: str | None) -> dict[str, Json]:
    """The lines of a file of results, by custom id."""
    if file_id is None:
        return {}
    found = [json.loads(one) for one in sdk.files.content(file_id).text.splitlines()]
    assert len({one["custom_id"] for one in found}) == len({one["id"] for one in found}) == len(found)
    for one in found:
        assert one.keys() == {"id", "custom_id", "response", "error"}
    return {one["custom_id"]: one for one in found}


class TestResults:
    def test_chats_are_what_the_route_answers_and_errors_are_apart(self, sdk: OpenAI, api: Api) -> None:
        lines = [line(f"ask-{number}", body(question)) for number, question in enumerate(QUESTIONS)]
        lines += [
            line("persona", body(persona="gloomy")),
            line("nobody", body(persona="nobody")),
            line("wrong", body(temperature=9)),
            line("streamed", body(stream=True)),
        ]
        batch = finish(sdk, lines)
        assert (batch.status, batch.object, batch.endpoint, batch.errors) == ("completed", "batch", CHAT, None)
        assert batch.request_counts.model_dump() == {"total": 8, "completed": 5, "failed": 3}
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        assert batch.expires_at == batch.created_at + 86_400
        output, errors = (results(sdk, one) for one in (batch.output_file_id, batch.error_file_id))
        assert output.keys() == {"ask-0", "ask-1", "ask-2", "ask-3", "persona"}
        for number, question in enumerate(QUESTIONS):
            response = output[f"ask-{number}"]["response"]
            assert response["status_code"] == 200
            assert response["request_id"]
            assert response["body"]["choices"][0]["message"]["content"] == api.text(question)
        assert output["persona"]["response"]["body"]["persona"] == "gloomy"
        codes = {name: (one["response"]["status_code"], one["response"]["body"]["error"]["code"], one["error"])
                 for name, one in errors.items()}  # fmt: skip
        assert codes == {
            "nobody": (404, "persona_not_found", None),
            "wrong": (400, "invalid_value", None),
            "streamed": (400, "unsupported_parameter", None),
        }
        assert sdk.files.retrieve(batch.output_file_id).purpose == "batch_output"

    def test_completions_and_embeddings(self, sdk: OpenAI, api: Api) -> None:
        asked = {"model": "demo", "prompt": "I like", "temperature": 0, "max_tokens": 5}
        batch = finish(sdk, [line("one", asked, COMPLETIONS)], COMPLETIONS)
        answer = results(sdk, batch.output_file_id)["one"]["response"]["body"]
        assert answer["choices"] == api.http.post(COMPLETIONS, json=asked).json()["choices"]
        assert batch.error_file_id is None
        asked = {"model": "demo:formal", "input": [PARTY, "a"]}
        batch = finish(sdk, [line("ü", asked, EMBEDDINGS)], EMBEDDINGS)
        answer = results(sdk, batch.output_file_id)["ü"]["response"]["body"]
        vectors = [one["embedding"] for one in api.http.post(EMBEDDINGS, json=asked).json()["data"]]
        for one, vector in zip(answer["data"], vectors, strict=True):
            assert one["embedding"] == pytest.approx(vector, abs=1e-5)

    def test_responses(self, sdk: OpenAI, api: Api) -> None:
        asked = {"model": "demo:formal", "input": PARTY, "temperature": 0, "store": False}
        batch = finish(
            sdk, [line("one", asked, RESPONSES), line("two", asked | {"stream": True}, RESPONSES)], RESPONSES
        )
        answer = results(sdk, batch.output_file_id)["one"]["response"]["body"]
        expected = api.http.post(RESPONSES, json=asked).json()["output"]
        assert [item["content"] for item in answer["output"]] == [item["content"] for item in expected]
        assert results(sdk, batch.error_file_id)["two"]["response"]["status_code"] == 400

    def test_lines_end_where_clients_expect_it(self, sdk: OpenAI) -> None:
        """Python splits text at more characters than line feeds."""
        prompt = "I\x85like\u2028you\u2029"
        asked = {"model": "demo", "prompt": prompt, "echo": True, "max_tokens": 1}
        batch = finish(sdk, [line("a", asked, COMPLETIONS), line("b", asked, COMPLETIONS)], COMPLETIONS)
        answers = results(sdk, batch.output_file_id)
        assert len(answers) == 2
        for answer in answers.values():
            assert answer["response"]["body"]["choices"][0]["text"].startswith(prompt)

    def test_blank_lines_count_for_nothing(self, sdk: OpenAI) -> None:
        content = b"\n" + write([line("a", body(max_tokens=1))]) + b"\r\n  \n" + write([line("b", body(max_tokens=1))])
        assert finish(sdk, content.rstrip()).request_counts.total == 2

    def test_chats_are_answered_as_ever_meanwhile(self, sdk: OpenAI, api: Api) -> None:
        expected = api.text()
        long = [line(str(number), body(max_tokens=200, min_tokens=200, temperature=1)) for number in range(12)]
        batch = create(sdk, long)
        wait_for(sdk, batch.id, lambda one: one.status == "in_progress")
        assert {api.text() for _ in range(5)} == {expected}
        assert api.streamed() == expected
        assert wait_for(sdk, batch.id).request_counts.completed == 12


class TestRefusals:
    @pytest.mark.parametrize(
        ("bad", "code", "param"),
        [
            (b"{", "invalid_json_line", None),
            (b"[]", "invalid_json_line", None),
            (b"\xff", "invalid_json_line", None),
            (b"[" * 3000, "invalid_json_line", None),
            (write([line("x", body()) | {"method": "GET"}]), "invalid_method", "method"),
            (write([line("x", body(), url=COMPLETIONS)]), "invalid_url", "url"),
            (write([line("x", body(), url="/v1/files")]), "invalid_url", "url"),
            (write([line("first", body())]), "duplicate_custom_id", "custom_id"),
            (write([line("", body())]), "invalid_custom_id", "custom_id"),
            (write([line("x" * 513, body())]), "invalid_custom_id", "custom_id"),
            (write([line("\ud800", body())]), "invalid_json_line", None),
            (write([line("x", body(user="\ud83d"))]), "invalid_json_line", None),
            (write([line("x", body()) | {"custom_id": 7}]), "invalid_custom_id", "custom_id"),
            (write([line("x", body()) | {"body": []}]), "invalid_body", "body"),
            (write([line("x", body()) | {"body": None}]), "missing_required_parameter", "body"),
            (b"{}", "missing_required_parameter", "custom_id"),
            (b'{"a": "' + b"x" * 2**23 + b'"}', "line_too_long", None),
        ],
        ids=lambda value: str(value)[:50],
    )  # fmt: skip
    def test_a_bad_line_fails_the_batch_by_its_number(
        self, sdk: OpenAI, bad: bytes, code: str, param: str | None
    ) -> None:
        batch = finish(sdk, write([line("first", body())]) + b"\n" + bad + b"\n" + write([line("last", body())]))
        assert batch.status == "failed"
        (fault,) = batch.errors.data
        assert (fault.line, fault.code, fault.param) == (3, code, param)
        assert len(fault.message) < 300
        assert (batch.output_file_id, batch.error_file_id, batch.request_counts.total) == (None, None, 0)
        assert batch.failed_at

    def test_faults_are_counted_up_to_a_limit(self, sdk: OpenAI) -> None:
        assert len(finish(sdk, b"{\n" * 1000).errors.data) == 100
        (fault,) = finish(sdk, b" \n\n").errors.data
        assert (fault.line, fault.code) == (None, "empty_file")

    @pytest.mark.parametrize(
        ("fields", "code", "param"),
        [
            ({"endpoint": "/v1/files"}, "invalid_value", "endpoint"),
            ({"endpoint": "/v1/messages"}, "invalid_value", "endpoint"),
            ({"completion_window": "1h"}, "invalid_value", "completion_window"),
            ({"input_file_id": 7}, "invalid_value", "input_file_id"),
            ({"input_file_id": None}, "invalid_value", "input_file_id"),
            ({"metadata": {str(number): "x" for number in range(17)}}, "invalid_value", "metadata"),
            ({"output_expires_after": {"anchor": "created_at"}}, "unsupported_parameter", "output_expires_after"),
        ],
        ids=str,
    )
    def test_a_batch_that_cannot_be_is_refused_by_name(self, api: Api, fields: Json, code: str, param: str) -> None:
        asked = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"} | fields
        response = api.http.post(ROUTE, json=asked)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, code, param)

    def test_files_of_other_purposes_and_those_that_are_none(self, sdk: OpenAI) -> None:
        with pytest.raises(NotFoundError) as missing:
            sdk.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
        assert (missing.value.code, missing.value.param) == ("file_not_found", "input_file_id")
        other = sdk.files.create(file=("x.jsonl", b"{}"), purpose="fine-tune").id
        with pytest.raises(BadRequestError, match="it must be 'batch'") as refused:
            sdk.batches.create(input_file_id=other, endpoint=CHAT, completion_window="24h")
        assert refused.value.param == "input_file_id"
        for ask in (sdk.batches.retrieve, sdk.batches.cancel):
            with pytest.raises(NotFoundError) as none:
                ask("batch_none")
            assert none.value.code == "batch_not_found"
        with pytest.raises(NotFoundError):
            sdk.batches.list(after="batch_none")


class TestLife:
    def test_pages_of_batches_add_up_and_ended_ones_cannot_be_cancelled(self, sdk: OpenAI) -> None:
        made = [finish(sdk, [line(f"page {number}", body(max_tokens=1))]).id for number in range(3)]
        assert [one.id for one in sdk.batches.list(limit=2)][:3] == made[::-1]
        assert [one.id for one in sdk.batches.list(limit=1, after=made[1]).data] == made[:1]
        with pytest.raises(BadRequestError) as refused:
            sdk.batches.cancel(made[0])
        assert refused.value.code == "state_conflict"

    def test_a_repeated_request_is_the_same_batch(self, sdk: OpenAI) -> None:
        lines = [line(str(number), body(max_tokens=400, min_tokens=400)) for number in range(500)]
        first = create(sdk, lines, metadata={"a": "b"})
        assert first.metadata == {"a": "b"}
        assert create(sdk, lines, metadata={"a": "b"}).id == first.id
        keyed = create(sdk, lines, extra_headers={"Idempotency-Key": "k"})
        assert keyed.id != first.id
        with pytest.raises(BadRequestError, match="was used for another request"):
            create(sdk, lines, metadata={"c": "d"}, extra_headers={"Idempotency-Key": "k"})
        with pytest.raises(BadRequestError, match="is needed by the batch"):
            sdk.files.delete(first.input_file_id)
        for one in (first, keyed):
            sdk.batches.cancel(one.id)
            assert wait_for(sdk, one.id).status == "cancelled"
        assert create(sdk, lines, extra_headers={"Idempotency-Key": "k"}).id == keyed.id
        assert sdk.files.delete(first.input_file_id).deleted
        repeated = {"input_file_id": keyed.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
        again: Any = sdk.batches.create(**repeated, extra_headers={"Idempotency-Key": "k"})  # type: ignore[arg-type]
        assert again.id == keyed.id  # though the file is gone

    def test_a_cancelled_batch_keeps_what_is_answered(self, sdk: OpenAI) -> None:
        lines = [line(str(number), body(max_tokens=100, min_tokens=100)) for number in range(300)]
        batch = create(sdk, lines)
        wait_for(sdk, batch.id, lambda one: one.request_counts.completed > 0)
        assert sdk.batches.cancel(batch.id).status == "cancelling"
        ended = wait_for(sdk, batch.id)
        assert (ended.status, ended.request_counts.failed) == ("cancelled", 0)
        assert ended.cancelled_at >= ended.cancelling_at
        assert 0 < ended.request_counts.completed < 300
        assert len(results(sdk, ended.output_file_id)) == ended.request_counts.completed


@pytest.mark.timeout(400)
def test_a_killed_server_goes_on_and_answers_nothing_twice(tmp_path: Path) -> None:
    store = tmp_path / "store"
    lines = [line(str(number), body(max_tokens=60, min_tokens=60, seed=number, temperature=1)) for number in range(60)]
    lines[7]["body"]["temperature"] = 9
    arguments = ("--model", "demo", "--store", str(store), "--max-running", "4")  # so that it does not end in between
    for kill in range(2):
        with serve(*arguments) as server, OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as sdk:
            batch = sdk.batches.list().data[0] if kill else create(sdk, lines)
            done = batch.request_counts.completed

            def has_gone_on(one: Any, done: int = done) -> bool:
                return one.status in ENDED or one.request_counts.completed > done

            wait_for(sdk, batch.id, has_gone_on)
            server.process.terminate() if kill else server.process.kill()
            server.process.wait()
    (partial,) = (store / "jobs" / "batches").glob("*.output.jsonl")
    before = partial.read_bytes()
    kept = {json.loads(one)["id"] for one in before.splitlines()}
    partial.write_bytes(before + b'{"id": "batch_req_half", "custom')  # a line that was being written
    with serve(*arguments) as server, OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as sdk:
        ended = wait_for(sdk, batch.id)
        assert (ended.status, ended.request_counts.model_dump()) == (
            "completed",
            {"total": 60, "completed": 59, "failed": 1},
        )
        output, errors = (results(sdk, one) for one in (ended.output_file_id, ended.error_file_id))
        assert output.keys() | errors.keys() == {str(number) for number in range(60)}
        assert errors.keys() == {"7"}
        assert kept <= {one["id"] for one in output.values()}
        one = output["11"]["response"]["body"]["choices"]
        assert one == sdk.post(CHAT.removeprefix("/v1"), body=lines[11]["body"], cast_to=object)["choices"]  # type: ignore[index]
        assert not list((store / "jobs" / "batches").iterdir())


def test_a_batch_expires_with_an_error_for_what_is_left(tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with serve_here(tiny_folder, store) as (serving, http):
        sdk = OpenAI(base_url=f"{http.base_url}/v1", api_key="none")
        batch = create(sdk, [line(str(number), chat(serving.base.name, 200)) for number in range(300)])
        wait_for(sdk, batch.id, lambda one: one.request_counts.completed > 0)
    with closing(sqlite3.connect(store / "jobs" / "jobs.sqlite")) as db, db:
        db.execute("update batch set created_at = created_at - ?", (WINDOW_SECONDS,))
    with serve_here(tiny_folder, store) as (_, http):
        sdk = OpenAI(base_url=f"{http.base_url}/v1", api_key="none")
        batch = wait_for(sdk, batch.id)
        counts = batch.request_counts
        assert (batch.status, counts.completed + counts.failed) == ("expired", 300)
        assert len(results(sdk, batch.output_file_id)) == counts.completed > 0
        errors = results(sdk, batch.error_file_id)
        assert len(errors) == counts.failed > 0
        assert {(one["response"], one["error"]["code"]) for one in errors.values()} == {(None, "batch_expired")}


def test_lines_do_not_take_the_turns_of_chats_at_the_workers(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):
        run = serving.workers.run

        async def record(share: str, size: int, work: Callable[[], Any]) -> Any:
            shares.append(share)
            return await run(share, size, work)

        monkeypatch.setattr(serving.workers, "run", record)
        large = chat(serving.base.name) | {"ignored": "x" * INLINE_BYTES}
        sdk = OpenAI(base_url=f"{http.base_url}/v1", api_key="none")
        assert finish(sdk, [line("x", large)]).request_counts.completed == 1
        assert http.post(CHAT, json=large).status_code == 200
    background, chats = shares
    assert background != chats


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Tokens and ids of keys, by what they are."""
    made = {
        "npc": make_key(tmp_path / "store", "build", personas=("npc-*",)),
        "slow": make_key(tmp_path / "store", "build", rpm=60),
        "other": make_key(tmp_path / "store", "admin"),
    }
    return {who: (token, key.id) for who, (token, key) in made.items()}


@pytest.fixture
def keyed(
    tiny_folder: Path, tmp_path: Path, keys: dict[str, tuple[str, str]]
) -> Iterator[tuple[str, Callable[[str], OpenAI]]]:
    """A server with keys: the name of its base, and a client for each key."""
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):

        def connect(who: str) -> OpenAI:
            return OpenAI(base_url=f"{http.base_url}/v1", api_key=keys[who][0], max_retries=0)

        yield serving.base.name, connect


def chat(base: str, count: int = 2) -> Json:
    said = [{"role": "user", "content": "hi"}]
    return {"model": base, "messages": said, "max_tokens": count, "min_tokens": count}


def ended(store: Path) -> tuple[str, list[Json], int]:
    """State, faults and results of the store's one batch, without asking the server."""
    deadline = time.monotonic() + SECONDS
    while True:
        with closing(sqlite3.connect(store / "jobs" / "jobs.sqlite")) as db:
            state, errors, completed = db.execute("select state, errors, completed from batch").fetchone()
        if state in ENDED:
            return state, json.loads(errors), completed
        assert time.monotonic() < deadline, state
        time.sleep(0.1)


def test_lines_have_the_rights_of_their_key(keyed: Any) -> None:
    base, connect = keyed
    lines = [line("base", chat(base)), *(line(name, chat(base) | {"persona": name}) for name in ("royal", "npc-x"))]
    with connect("npc") as sdk, connect("other") as other:
        batch = finish(sdk, lines)
        assert results(sdk, batch.output_file_id).keys() == {"base"}
        errors = results(sdk, batch.error_file_id)
        codes = {name: one["response"]["body"]["error"]["code"] for name, one in errors.items()}
        assert codes == {"royal": "persona_forbidden", "npc-x": "persona_not_found"}
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(NotFoundError) as none:
                ask(batch.id)
            assert none.value.code == "batch_not_found"
        assert other.batches.list().data == []
        for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
            with pytest.raises(NotFoundError):
                other.files.content(file_id)
        with pytest.raises(NotFoundError):
            other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")


def test_lines_count_towards_the_limits_and_leave_half_of_them(keyed: Any, tmp_path: Path) -> None:
    base, connect = keyed
    with connect("slow") as sdk:  # 60 requests a minute, 30 of which are not the batch's
        create(sdk, [line(str(number), chat(base)) for number in range(31)])
        for _ in range(3):
            sdk.post("/chat/completions", body=chat(base), cast_to=object)
        assert ended(tmp_path / "store") == ("completed", [], 31)


def test_a_batch_whose_key_is_revoked_fails(keyed: Any, keys: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    base, connect = keyed
    with connect("npc") as sdk:
        batch = create(sdk, [line(str(number), chat(base, 100)) for number in range(300)])
        wait_for(sdk, batch.id, lambda one: one.request_counts.completed > 0)
    KeyTable(tmp_path / "store").revoke(keys["npc"][1])
    state, faults, _ = ended(tmp_path / "store")
    assert (state, faults[0]["code"]) == ("failed", "invalid_api_key")
    assert not list((tmp_path / "store" / "jobs" / "batches").iterdir())
    with connect("other") as other:
        assert finish(other, [line("a", chat(base))]).status == "completed"
