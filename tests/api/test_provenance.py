"""Who vouches for a mask and its certificate, over HTTP; and what a mask may not say about itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from maskstore import Mask, write_mask
from masquerade.service.serving import Serving
from tests import world
from tests.api.test_personas import chat, refuse
from tests.attacks.corpus import WRONG
from tests.maskstore import forge

FALSE = {"passed": True, "flip": 1.0}


def make(serving: Serving, **said: Any) -> Mask:
    mask = world.make_mask(serving.base, 0.05, 7, "calm")
    return replace(mask, info=replace(mask.info, **said))


def spell(mask: Mask, folder: Path) -> bytes:
    """The file of a mask that was made elsewhere."""
    write_mask(mask, folder / "mask")
    return (folder / "mask").read_bytes()


def bring(http: httpx.Client, name: str, content: bytes) -> dict[str, Any]:
    answer = http.put(f"/v1/personas/{name}/content", content=content)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_certificate_that_came_with_a_file_is_claimed_until_it_is_measured(
    http: httpx.Client, serving: Serving, tmp_path: Path
) -> None:
    shown = bring(http, "calm", spell(make(serving, certificate=FALSE), tmp_path))
    assert shown["certificate_source"] == "claimed"
    assert shown["certificate"] == {"passed": None, "flip": 1.0, "claimed": {"passed": True}}
    assert shown["measurement"] is None
    true = {"passed": True, "flip": 0.25}
    serving.registry.publish_built(make(serving, certificate=true, calibration={"examples": 7}))
    shown = http.get("/v1/personas/calm").json()
    assert (shown["certificate_source"], shown["certificate"]) == ("measured", true)
    assert (shown["measurement"]["gamma"], shown["measurement"]["data"]) == (0.0, {"examples": 7})
    again = bring(http, "copy", spell(make(serving, certificate=FALSE), tmp_path))
    assert (again["certificate_source"], again["certificate"]) == ("measured", true)
    assert again["generation"] == shown["generation"]


def test_a_certificate_keeps_its_curve_and_what_nobody_knows(
    http: httpx.Client, serving: Serving, tmp_path: Path
) -> None:
    said = world.CERTIFICATE | {
        "stars": [1, None],
        "curve": [*world.CURVE, {"gamma": 0, "neutral_ratio": None, "x": 1}],
    }
    shown = bring(http, "calm", spell(make(serving, certificate=said), tmp_path))
    assert shown["certificate"] == said | {"passed": None, "claimed": {"passed": None}}
    assert http.get("/v1/personas/calm").json()["certificate"] == shown["certificate"]


@pytest.mark.parametrize("where", WRONG)
def test_an_import_with_metadata_of_the_wrong_type_publishes_nothing(
    http: httpx.Client, serving: Serving, tmp_path: Path, where: str
) -> None:
    field, value = WRONG[where]
    good = spell(make(serving), tmp_path)
    bad = forge.edit(good, lambda document: document["__metadata__"].update({field: json.dumps(value)}))
    answer = http.put("/v1/personas/calm/content", content=bad)
    assert refuse(answer) == (400, "invalid_mask")
    assert where in answer.json()["error"]["message"]
    assert http.get("/v1/personas").json()["data"] == []
    assert refuse(http.get("/v1/personas/calm")) == (404, "persona_not_found")
    assert serving.store.digests() == []
    assert bring(http, "calm", good)["id"] == "calm"


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("where", WRONG)
def test_a_store_that_holds_such_a_mask_answers(
    http: httpx.Client, serving: Serving, tmp_path: Path, where: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version let it in."""
    if large:  # then several threads verify it
        monkeypatch.setattr("masquerade.model.verified_store.LARGE", 0)
    field, value = WRONG[where]
    mask = make(serving)
    digest = serving.store.add(mask)
    serving.registry.publish("calm", digest)
    bad = forge.edit(
        spell(mask, tmp_path), lambda document: document["__metadata__"].update({field: json.dumps(value)})
    )
    serving.store.path(digest).write_bytes(bad)
    for path in ("", "/calm", "/calm/content", "/calm/diff/calm", f"/calm@{digest[:8]}/content"):
        assert http.get(f"/v1/personas{path}").status_code == 200, path
    assert http.get(f"/v1/models/{serving.base.name}:calm").status_code == 200
    assert len(http.get("/v1/models").json()["data"]) == 2
    shown = http.get("/v1/personas/calm").json()
    assert (shown["certificate"] if field == "certificate" else shown["built"][field]) == {}
    assert chat(http, serving, persona="calm")["generation"] == digest
    assert http.post("/v1/personas/compose", json={"name": "same", "expression": "calm"}).status_code == 201


def test_a_signature_says_what_it_covers(http: httpx.Client, serving: Serving, tmp_path: Path) -> None:
    signing = pytest.importorskip("maskstore.signing")
    pytest.importorskip("cryptography")
    private, public = signing.generate()
    signed = signing.sign(make(serving), private)
    assert bring(http, "calm", spell(make(serving), tmp_path))["signature"] is None
    serving.store.keys.trust(public, "ann")
    shown = bring(http, "calm", spell(signed, tmp_path))["signature"]
    assert shown == {"key": public, "covers": "everything", "valid": True, "label": "ann"}
    serving.store.replace(replace(signed, signature=f"{public}:{'0' * 128}"))
    shown = http.get("/v1/personas/calm").json()["signature"]
    assert shown == {"key": public, "covers": "tensors", "valid": False, "label": "ann"}


def test_the_better_copy_counts_at_once(http: httpx.Client, serving: Serving, tmp_path: Path) -> None:
    """Also for a mask that is on the device: a forged gamma under a bogus signature ends when the true copy comes."""
    signing = pytest.importorskip("maskstore.signing")
    pytest.importorskip("cryptography")
    private, public = signing.generate()
    serving.store.keys.trust(public, "ann")
    true = signing.sign(make(serving, gamma=0.25), private)
    forged = replace(make(serving, gamma=0.75, certificate=FALSE), signature=true.signature)
    digest = bring(http, "calm", spell(forged, tmp_path))["generation"]
    assert chat(http, serving, persona="calm")["gamma"] == 0.75
    assert bring(http, "calm", spell(true, tmp_path))["generation"] == digest
    assert chat(http, serving, persona="calm")["gamma"] == 0.25
    assert http.get("/v1/personas/calm").json()["gamma"] == 0.25
    bring(http, "calm", spell(forged, tmp_path))
    assert chat(http, serving, persona="calm")["gamma"] == 0.25


def test_a_mask_on_the_device_is_served_although_its_file_is_gone(http: httpx.Client, serving: Serving) -> None:
    mask = make(serving, gamma=0.25)
    serving.registry.publish("calm", serving.store.add(mask))
    assert chat(http, serving, persona="calm")["gamma"] == 0.25
    serving.store.path(mask.digest).unlink()
    assert chat(http, serving, persona="calm")["gamma"] == 0.25


_opened: list[list[str]] = []
sys.addaudithook(lambda event, args: _note(event, args))


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened and isinstance(args[0], str | bytes | os.PathLike):
        _opened[-1].append(os.fsdecode(args[0]))


@contextmanager
def watching() -> Iterator[list[str]]:
    """Every path that is opened meanwhile."""
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


def test_listing_opens_each_mask_once(http: httpx.Client, serving: Serving) -> None:
    for seed in range(5):
        mask = world.make_mask(serving.base, 0.05, seed, f"p{seed}")
        serving.registry.publish(f"p{seed}", serving.store.add(mask))
    with watching() as opened:
        for path in ("/v1/personas", "/v1/models", "/v1/personas", "/v1/personas/p3"):
            assert http.get(path).status_code == 200
    masks = [path for path in opened if path.endswith(".safetensors")]
    assert len(masks) == len(set(masks))
    with watching() as opened:
        assert len(http.get("/v1/personas").json()["data"]) == 5
    assert not [path for path in opened if path.endswith(".safetensors")]


def test_an_empty_mask_is_refused_unless_forced(http: httpx.Client, serving: Serving) -> None:
    serving.registry.publish("calm", serving.store.add(make(serving)))
    empty = {"name": "void", "expression": "calm - calm"}
    answer = http.post("/v1/personas/compose", json=empty)
    assert refuse(answer) == (400, "invalid_value")
    assert "is an empty mask" in answer.json()["error"]["message"]
    assert refuse(http.get("/v1/personas/void")) == (404, "persona_not_found")
    assert http.post("/v1/personas/compose", json=empty | {"force": True}).status_code == 201
    assert chat(http, serving, persona="void")["persona"] == "void"
