"""A key sees only what it may: personas on its list, and its own files and jobs."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from masquerade import demo
from masquerade.engine import Engine, Request
from tests.access.conftest import Keyed, code_of

MESSAGES = [{"role": "user", "content": "hi"}]
FORBIDDEN, GHOST = "royal", "nobody"  # one is there, the other is not; neither is on the list of npc keys


def chat(keyed: Keyed, who: str, **fields: Any) -> Any:
    headers = fields.pop("headers", {})
    body = {"model": keyed.serving.base.name, "messages": MESSAGES, "max_tokens": 2} | fields
    return keyed.ask(who, "POST", "/v1/chat/completions", json=body, headers=headers)


def test_lists_show_what_is_on_the_keys_list(keyed: Keyed) -> None:
    name = keyed.serving.base.name
    models = {one["id"] for one in keyed.ask("npc chat", "GET", "/v1/models").json()["data"]}
    personas = {one["id"] for one in keyed.ask("npc chat", "GET", "/v1/personas").json()["data"]}
    assert models == {name, f"{name}:npc-bob", f"{name}:npc-eve"}
    assert personas == {"npc-bob", "npc-eve"}
    assert {one["id"] for one in keyed.ask("chat", "GET", "/v1/personas").json()["data"]} == {*personas, "royal"}


def test_a_persona_on_the_list_and_the_bare_base_answer(keyed: Keyed) -> None:
    for fields in ({}, {"persona": "npc-bob"}, {"model": f"{keyed.serving.base.name}:npc-eve"}):
        assert chat(keyed, "npc chat", **fields).status_code == 200


def ways(keyed: Keyed, name: str) -> list[Any]:
    """Every way to name a persona."""
    base = keyed.serving.base.name
    digest = keyed.serving.registry.resolve("royal").digest[:8]
    body = {"model": f"{base}:{name}"}
    return [
        chat(keyed, "npc chat", persona=name),
        chat(keyed, "npc chat", persona=f"{name}@{digest}"),
        chat(keyed, "npc chat", model=f"{base}:{name}"),
        chat(keyed, "npc chat", model=f"{base}:{name}@{digest}"),
        chat(keyed, "npc chat", headers={"X-Persona": name}),
        chat(keyed, "npc chat", persona=name, stream=True),
        keyed.ask("npc chat", "POST", "/v1/completions", json=body | {"prompt": "hi"}),
        keyed.ask("npc chat", "POST", "/v1/responses", json=body | {"input": "hi"}),
        keyed.ask("npc chat", "POST", "/v1/embeddings", json=body | {"input": "hi"}),
        keyed.ask("npc chat", "POST", "/tokenize", json=body | {"prompt": "hi"}),
        *(keyed.ask("npc chat", "POST", f"/v1/messages{path}", json=body | {"messages": MESSAGES, "max_tokens": 2},
                    headers={"x-request-id": "same"}) for path in ("", "/count_tokens")),
        keyed.ask("npc chat", "GET", f"/v1/personas/{name}"),
        keyed.ask("npc build", "GET", f"/v1/personas/{name}/diff/npc-bob"),
        keyed.ask("npc build", "GET", f"/v1/personas/npc-bob/diff/{name}"),
        *(keyed.ask("npc admin", *asked) for asked in (
            ("DELETE", f"/v1/personas/{name}"),
            ("PUT", f"/v1/personas/{name}/pin"),
            ("DELETE", f"/v1/personas/{name}/pin"),
            ("GET", f"/v1/personas/{name}/content"),
            ("PUT", f"/v1/personas/{name}/content"),
        )),
        keyed.ask("npc admin", "PATCH", f"/v1/personas/{name}", json={"notes": "x"}),
        keyed.ask("npc admin", "POST", f"/v1/personas/{name}/rename", json={"name": "npc-z"}),
        keyed.ask("npc admin", "POST", "/v1/personas/npc-bob/rename", json={"name": name}),
        keyed.ask("npc admin", "POST", f"/v1/personas/{name}/rollback", json={}),
        keyed.ask("npc admin", "PUT", "/v1/aliases/npc-z", json={"persona": name}),
        keyed.ask("npc admin", "PUT", f"/v1/aliases/{name}", json={"persona": "npc-bob"}),
        keyed.ask("npc admin", "POST", "/v1/personas/compose", json={"name": name, "expression": "npc-bob"}),
    ]  # fmt: skip


def test_a_name_that_is_not_on_the_list_is_refused_the_same_way_whether_it_is_there_or_not(keyed: Keyed) -> None:
    before = keyed.serving.registry.names(), keyed.serving.registry.aliases()
    for forbidden, ghost in zip(ways(keyed, FORBIDDEN), ways(keyed, GHOST), strict=True):
        assert forbidden.status_code == 403, forbidden.text
        assert code_of(forbidden) == "persona_forbidden"
        assert forbidden.text.replace(FORBIDDEN, GHOST) == ghost.text
        assert forbidden.status_code == ghost.status_code
    assert (keyed.serving.registry.names(), keyed.serving.registry.aliases()) == before


def test_the_models_route_and_expressions_do_not_tell_either(keyed: Keyed) -> None:
    base = keyed.serving.base.name
    for path, body in (
        (f"/v1/models/{base}:{{}}", None),
        ("/v1/personas/compose", {"name": "npc-mix", "expression": "npc-bob | {}"}),
    ):
        told = []
        for name in (FORBIDDEN, GHOST):
            filled = json.loads(json.dumps(body).replace("{}", name))
            who, method = ("npc admin", "POST") if body else ("npc chat", "GET")
            told.append(keyed.ask(who, method, path.replace("{}", name), json=filled))
        assert [answer.status_code for answer in told] == [404, 404]
        assert told[0].text.replace(FORBIDDEN, GHOST) == told[1].text


def test_the_name_that_is_asked_for_decides(keyed: Keyed) -> None:
    """An alias is a name like any other: it lets keys with that name on their list use its persona."""
    registry = keyed.serving.registry
    registry.alias("npc-king", "royal")
    registry.alias("boss", "npc-bob")
    try:
        assert chat(keyed, "npc chat", persona="npc-king").status_code == 200
        assert chat(keyed, "npc chat", persona="boss").status_code == 403
        shown = keyed.ask("npc chat", "GET", "/v1/personas/npc-bob").json()
        assert shown["aliases"] == []  # `boss` is not on the list
    finally:
        registry.remove("npc-king")
        registry.remove("boss")


def test_who_may_use_a_persona_by_an_alias_may_not_manage_it(keyed: Keyed) -> None:
    """The alias is on the list of a key that manages; the persona behind it is not."""
    registry = keyed.serving.registry
    registry.alias("npc-king", "royal")
    before = registry.describe("royal")
    try:
        assert chat(keyed, "npc admin", persona="npc-king").status_code == 200
        for method, path, body in (
            ("PATCH", "/v1/personas/npc-king", {"notes": "mine"}),
            ("POST", "/v1/personas/npc-king/rename", {"name": "npc-mine"}),
            ("POST", "/v1/personas/npc-king/rollback", {}),
            ("PUT", "/v1/personas/npc-king/pin", None),
            ("DELETE", "/v1/personas/npc-king/pin", None),
            ("GET", "/v1/personas/npc-king/content", None),
            ("PUT", "/v1/aliases/npc-prince", {"persona": "npc-king"}),
        ):
            refused = keyed.ask("npc admin", method, path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "persona_forbidden"), path
            assert "royal" not in refused.text
        assert registry.describe("royal") == before
        assert keyed.ask("npc admin", "DELETE", "/v1/personas/npc-king").status_code == 200  # the alias is its own
        assert registry.describe("royal").current == before.current
    finally:
        if "npc-king" in registry.aliases():
            registry.remove("npc-king")


def upload(keyed: Keyed, who: str) -> str:
    file = (demo.DATA / "formal.train.jsonl").read_bytes()
    answer = keyed.ask(who, "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("f.jsonl", file)})
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


def order(keyed: Keyed, who: str, training: str, name: str, **mask: Any) -> Any:
    method = {"type": "mask", "mask": {"score": "magnitude", "rho": 0.01} | mask}
    body = {"model": keyed.serving.base.name, "training_file": training, "suffix": name, "method": method}
    return keyed.ask(who, "POST", "/v1/fine_tuning/jobs", json=body)


def test_files_belong_to_keys(keyed: Keyed) -> None:
    mine, theirs = upload(keyed, "npc build"), upload(keyed, "royal build")
    assert mine != theirs  # the same content is one file only for one key
    for who, own, other in (("npc build", mine, theirs), ("royal build", theirs, mine)):
        assert [one["id"] for one in keyed.ask(who, "GET", "/v1/files").json()["data"]] == [own]
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            foreign = keyed.ask(who, method, f"/v1/files/{other}{path}")
            absent = keyed.ask(who, method, f"/v1/files/file-0{path}")
            assert foreign.status_code == absent.status_code == 404
            assert foreign.text.replace(other, "file-0") == absent.text
        assert keyed.ask("admin", "GET", f"/v1/files/{own}").status_code == 404
    refused = order(keyed, "npc build", theirs, "npc-new")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "file_not_found")
    for who, own in (("npc build", mine), ("royal build", theirs)):
        assert keyed.ask(who, "DELETE", f"/v1/files/{own}").status_code == 200


@pytest.mark.parametrize("mask", [{}, {"contrast_name": "royal"}])
def test_only_names_on_the_list_can_be_built(keyed: Keyed, mask: dict[str, str]) -> None:
    training = upload(keyed, "npc build")
    told = {}
    for name in (FORBIDDEN, GHOST):
        suffix, more = ("npc-new", {"contrast_name": name, "contrast_file": training}) if mask else (name, {})
        answer = order(keyed, "npc build", training, suffix, **more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "persona_forbidden")
        assert answer.json()["error"]["param"] == ("method.mask.contrast_name" if mask else "suffix")
        told[name] = answer.text.replace(name, "")
    assert told[FORBIDDEN] == told[GHOST]
    form = {"name": FORBIDDEN, "score": "magnitude", "rho": "0.01"}
    file = {"file": ("f.jsonl", (demo.DATA / "formal.train.jsonl").read_bytes())}
    assert keyed.ask("npc build", "POST", "/v1/personas", data=form, files=file).status_code == 403


def test_jobs_belong_to_keys(keyed: Keyed) -> None:
    made = order(keyed, "npc build", upload(keyed, "npc build"), "npc-built")
    assert made.status_code == 200, made.text
    job = made.json()["id"]
    for who in ("royal build", "admin"):
        assert keyed.ask(who, "GET", "/v1/fine_tuning/jobs").json()["data"] == []
        for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/checkpoints")):
            foreign = keyed.ask(who, method, f"/v1/fine_tuning/jobs/{job}{path}")
            absent = keyed.ask(who, method, f"/v1/fine_tuning/jobs/ftjob-0{path}")
            assert foreign.status_code == absent.status_code == 404
            assert foreign.text.replace(job, "ftjob-0") == absent.text
    assert keyed.ask("npc build", "GET", f"/v1/fine_tuning/jobs/{job}").status_code == 200


def test_whose_job_takes_a_name_is_told_to_its_owner_only(keyed: Keyed) -> None:
    held = threading.Event()
    keyed.serving.engine.run_background(lambda: held.wait(60))
    try:
        job = order(keyed, "npc build", upload(keyed, "npc build"), "npc-twin").json()["id"]
        for who, told in (("npc build", True), ("build", False)):
            refused = order(keyed, who, upload(keyed, who), "npc-twin", rho=0.02)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "persona_exists")
            assert (job in refused.text) == told
        assert keyed.ask("npc build", "POST", f"/v1/fine_tuning/jobs/{job}/cancel").status_code == 200
    finally:
        held.set()


def test_the_engine_knows_whose_work_it_does(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[str] = []
    submit = Engine.submit

    def watch(self: Engine, *requests: Request) -> None:
        owners.extend(request.owner for request in requests)
        submit(self, *requests)

    monkeypatch.setattr(Engine, "submit", watch)
    for who in ("chat", "npc chat"):
        assert chat(keyed, who).status_code == 200
    assert owners == [keyed.keys["chat"].id, keyed.keys["npc chat"].id]
