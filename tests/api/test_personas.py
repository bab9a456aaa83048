"""`/v1/personas` over HTTP, on a real store: what is shown, what may be changed, and what a loser of a race is told."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from maskstore import fsck, read_info
from masquerade.service.serving import Serving
from tests import world


@pytest.fixture(autouse=True)
def _shop(serving: Serving) -> None:
    """`calm` with two generations, and `loud`."""
    for seed, persona in enumerate(("calm", "calm", "loud")):
        mask = world.make_mask(serving.base, 0.05, seed, persona)
        serving.registry.publish(persona, serving.store.add(mask))


def refuse(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def chat(http: httpx.Client, serving: Serving, **more: Any) -> dict[str, Any]:
    body = {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = http.post("/v1/chat/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_list_is_of_this_base_only(http: httpx.Client, serving: Serving) -> None:
    stranger = world.make_mask(serving.base, 0.05, 9, "stranger")
    object.__setattr__(stranger, "base", type(stranger.base)("0" * 64, "another"))
    serving.registry.publish("stranger", serving.store.add(stranger))
    listed = http.get("/v1/personas").json()
    assert [persona["id"] for persona in listed["data"]] == ["calm", "loud"]
    assert listed["data"][0]["model"] == f"{serving.base.name}:calm"


def test_a_persona_shows_its_digest_as_entity_tag_its_history_and_residency(
    http: httpx.Client, serving: Serving
) -> None:
    answer = http.get("/v1/personas/calm")
    shown = answer.json()
    digests = [generation.digest for generation in serving.registry.history("calm")]
    assert answer.headers["etag"] == f'"{digests[0]}"'
    assert [past["generation"] for past in shown["history"]] == digests
    assert shown["built"]["score"] == "random"
    assert shown["resident"] is False
    assert chat(http, serving, persona="calm")["generation"] == digests[0]
    shown = http.get("/v1/personas/calm").json()
    assert (shown["resident"], shown["requests"]) == (True, 1)


def test_rollback_and_older_generations(http: httpx.Client, serving: Serving) -> None:
    new, old = (generation.digest for generation in serving.registry.history("calm"))
    assert chat(http, serving, persona=f"calm@{old[:8]}")["generation"] == old
    older = f"{serving.base.name}:calm@{old[:8]}"
    answer = chat(http, serving, model=older)
    assert (answer["generation"], answer["model"]) == (old, older)
    assert http.post("/v1/personas/calm/rollback").json()["generation"] == old
    assert http.post("/v1/personas/calm/rollback", json={"to": 2}).json()["generation"] == new
    assert http.post("/v1/personas/calm/rollback", json={}).json()["generation"] == old
    assert chat(http, serving, persona="calm")["generation"] == old
    assert http.post("/v1/personas/calm/rollback", json={"to": 2}).json()["generation"] == new
    assert refuse(http.post("/v1/personas/calm/rollback", json={"to": 7})) == (404, "persona_not_found")


def test_names_aliases_tags_and_defaults(http: httpx.Client, serving: Serving) -> None:
    assert http.put("/v1/aliases/quiet", json={"persona": "calm"}).json()["aliases"] == ["quiet"]
    assert chat(http, serving, persona="quiet")["persona"] == "calm"
    changed = http.patch("/v1/personas/calm", json={"gamma": 0.5, "notes": "soft", "tags": ["npc", "inn"]}).json()
    assert (changed["gamma"], changed["notes"], changed["tags"]) == (0.5, "soft", ["inn", "npc"])
    assert chat(http, serving, persona="calm")["gamma"] == 0.5
    refused = http.patch("/v1/personas/calm", json={"gamma": 0.9, "notes": "new", "tags": ["ok", "bad tag"]})
    assert refused.status_code == 400
    kept = http.get("/v1/personas/calm").json()
    assert (kept["gamma"], kept["notes"], kept["tags"]) == (0.5, "soft", ["inn", "npc"])
    changed = http.patch("/v1/personas/calm", json={"gamma": None, "tags": ["npc"]}).json()
    assert (changed["gamma"], changed["notes"], changed["tags"]) == (0.0, "soft", ["npc"])
    assert [persona["id"] for persona in http.get("/v1/personas?tag=npc").json()["data"]] == ["calm"]
    assert http.post("/v1/personas/calm/rename", json={"name": "serene"}).json()["aliases"] == ["quiet"]
    assert refuse(http.post("/v1/personas/loud/rename", json={"name": "serene"})) == (400, "persona_exists")
    assert refuse(http.get("/v1/personas/calm")) == (404, "persona_not_found")
    assert http.delete("/v1/personas/quiet").json()["deleted"]
    assert http.get("/v1/personas/serene").status_code == 200


def test_defaults_are_those_a_generation_was_published_with(http: httpx.Client, serving: Serving) -> None:
    soft = replace(world.make_mask(serving.base, 0.05, 1, "soft").info, gamma=0.5, phase="decode")
    serving.registry.publish("soft", serving.registry.resolve("calm").digest, info=soft)  # whose file says otherwise
    shown = http.get("/v1/personas/soft").json()
    assert (shown["gamma"], shown["phase"]) == (0.5, "decode")
    assert chat(http, serving, persona="soft")["gamma"] == 0.5
    assert chat(http, serving, persona="calm")["gamma"] == 0


def test_pins(http: httpx.Client, serving: Serving) -> None:
    assert http.put("/v1/personas/calm/pin").json()["pinned"]
    assert not http.delete("/v1/personas/calm/pin").json()["pinned"]
    assert refuse(http.delete("/v1/personas/calm/pin")) == (404, "persona_not_found")


def test_compose_and_diff_follow_the_sets(http: httpx.Client, serving: Serving) -> None:
    made = http.post("/v1/personas/compose", json={"name": "both", "expression": "calm | loud"})
    assert made.status_code == 201
    a, b, both = (serving.store.open(serving.registry.resolve(name).digest) for name in ("calm", "loud", "both"))
    assert both == a | b
    assert chat(http, serving, persona="both")["generation"] == both.digest
    told = http.get("/v1/personas/calm/diff/both").json()
    assert (told["object"], told["a"], told["b"]) == ("persona.diff", a.digest, both.digest)
    assert told["total"]["jaccard"] == pytest.approx(a.pruned / both.pruned)
    assert sum(part["both"] for part in told["modules"].values()) == told["total"]["both"] == a.pruned
    bad = http.post("/v1/personas/compose", json={"name": "x", "expression": "calm |"})
    assert refuse(bad) == (400, "invalid_value")


def test_a_mask_goes_out_and_comes_in_the_same(http: httpx.Client, serving: Serving) -> None:
    out = http.get("/v1/personas/calm/content")
    digest = serving.registry.resolve("calm").digest
    assert out.headers["etag"] == f'"{digest}"'
    made = http.put("/v1/personas/copy/content", content=out.content)
    assert (made.status_code, made.json()["generation"]) == (201, digest)
    assert chat(http, serving, persona="copy")["generation"] == digest


def test_a_mask_goes_out_as_it_is_served(http: httpx.Client, serving: Serving) -> None:
    """Of two personas of one mask, each file has the defaults of its own."""
    stored = serving.store.open(serving.registry.resolve("calm").digest)
    info = replace(stored.info, persona="softer", gamma=0.25, phase="decode")
    serving.registry.publish("softer", stored.digest, info=info)
    for name in ("calm", "softer"):
        out = http.get(f"/v1/personas/{name}/content")
        assert http.put(f"/v1/personas/{name}-2/content", content=out.content).status_code == 201
        upload = serving.store.root / "out.safetensors"
        upload.write_bytes(out.content)
        served = http.get(f"/v1/personas/{name}").json()
        found, copy = read_info(upload), http.get(f"/v1/personas/{name}-2").json()
        assert (found.persona, found.gamma, found.phase) == (name, served["gamma"], served["phase"])
        assert (copy["gamma"], copy["phase"]) == (served["gamma"], served["phase"])
        match = {"If-Match": out.headers["ETag"]}
        assert http.put(f"/v1/personas/{name}/content", content=out.content, headers=match).status_code == 201
    assert http.get("/v1/personas/softer/content", headers={"Range": "bytes=0-7"}).content == out.content[:8]
    assert http.get("/v1/personas/softer/content", headers={"Range": "bytes=9-3"}).status_code == 400
    deadline = time.monotonic() + 10
    while list(serving.store.quarantine().iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("damage", ["cut", "flipped", "nonsense", "other base", "larger than any mask"])
def test_a_bad_import_changes_nothing(http: httpx.Client, serving: Serving, damage: str) -> None:
    good = http.get("/v1/personas/loud/content").content
    before = serving.registry.personas()
    if damage == "other base":
        object.__setattr__(serving.base, "fingerprint", "0" * 64)
    body = {
        "cut": good[:-5],
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "nonsense": b"\x80\x04.",
        "other base": good,
        "larger than any mask": bytes(serving.largest_mask + 2**24 + 1),
    }[damage]
    assert refuse(http.put("/v1/personas/calm/content", content=body)) == (400, "invalid_mask")
    assert serving.registry.personas() == before
    assert not list((serving.store.root / "quarantine").iterdir())
    assert fsck(serving.store.root).clean


def test_if_match_is_compare_and_swap(http: httpx.Client, serving: Serving) -> None:
    tag = http.get("/v1/personas/calm").headers["etag"]
    loud = http.get("/v1/personas/loud/content").content
    stale = {"If-Match": '"' + "0" * 64 + '"'}
    for method, path, body in (
        ("PUT", "/v1/personas/calm/content", {"content": loud}),
        ("POST", "/v1/personas/calm/rollback", {"json": {}}),
        ("POST", "/v1/personas/calm/rename", {"json": {"name": "other"}}),
        ("DELETE", "/v1/personas/calm", {}),
        ("POST", "/v1/personas/compose", {"json": {"name": "calm", "expression": "loud"}}),
    ):
        assert refuse(http.request(method, path, headers=stale, **body)) == (412, "generation_conflict")  # type: ignore[arg-type]
    assert http.get("/v1/personas/calm").headers["etag"] == tag
    assert http.put("/v1/personas/calm/content", content=loud, headers={"If-Match": tag}).status_code == 201
    new = {"If-None-Match": "*"}
    assert http.put("/v1/personas/fresh/content", content=loud, headers=new).status_code == 201
    other = http.get(f"/v1/personas/calm@{tag[1:9]}/content").content
    assert refuse(http.put("/v1/personas/fresh/content", content=other, headers=new)) == (412, "generation_conflict")
    assert refuse(http.put("/v1/personas/x/content", content=loud, headers={"If-None-Match": "abc"}))[0] == 400


def test_of_many_writers_with_the_same_tag_one_wins(http: httpx.Client, serving: Serving) -> None:
    tag = http.get("/v1/personas/calm").headers["etag"]

    def write(index: int) -> int:
        body = {"name": "calm", "expression": "loud" if index % 2 else "~loud"}
        return http.post("/v1/personas/compose", json=body, headers={"If-Match": tag}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(write, range(8)))
    # composing what is current already is no change, so the winner's twins may succeed as well
    assert 201 in statuses
    assert set(statuses) <= {201, 412}
    assert len(serving.registry.history("calm")) == 3


@pytest.mark.parametrize("name", ["A", "a/b", "..", "none", "x" * 65, "ü"])
def test_names_that_are_none_are_refused(http: httpx.Client, name: str) -> None:
    answer = http.put(f"/v1/aliases/{name}", json={"persona": "calm"})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["code"] in ("invalid_value", "not_found")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/v1/personas/calm", None),
        ("POST", "/v1/personas/compose", {"name": "calm", "expression": "loud"}),
        ("POST", "/v1/personas/calm/rollback", {}),
        ("PATCH", "/v1/personas/calm", {"gamma": 0.9}),
    ],
)
def test_deleting_or_replacing_does_not_disturb_who_is_speaking(
    http: httpx.Client, serving: Serving, method: str, path: str, body: dict[str, Any] | None
) -> None:
    asked: dict[str, Any] = {"model": serving.base.name, "persona": "calm", "temperature": 0, "max_tokens": 150}
    asked |= {"messages": [{"role": "user", "content": "hi"}]}
    whole = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    with http.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        with httpx.Client(base_url=http.base_url) as other:
            assert other.request(method, path, json=body).is_success
        text = "".join(_delta(line) for line in lines)
    assert text == whole


def _delta(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    choices = json.loads(line[6:])["choices"]
    return choices[0]["delta"].get("content", "") if choices else ""
