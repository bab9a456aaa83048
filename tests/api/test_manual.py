"""The interface describes itself, and the description in the repository is the present one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from masquerade.app import describe
from masquerade.http.reference import find_example, write
from tests.access.test_matrix import DECISIONS

API_MD = Path(__file__).parents[2] / "docs" / "api.md"
OPENAPI: dict[str, Any] = describe().openapi()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
}
BODIES = [
    (f"{route}, {kind}", content)
    for route, operation in OPERATIONS.items()
    for part in (operation.get("requestBody", {}), *operation["responses"].values())
    for kind, content in part.get("content", {}).items()
]
BYTES = "PUT /v1/personas/{name}/content, application/octet-stream"  # no text shows what is in there


def test_the_manual_in_the_repository_is_what_make_docs_writes() -> None:
    assert API_MD.read_text(encoding="utf-8") == write(OPENAPI), "run `make docs`"


@pytest.mark.parametrize(("route", "content"), BODIES, ids=[route for route, _ in BODIES])
def test_every_body_and_every_answer_has_an_example_that_fits(route: str, content: dict[str, Any]) -> None:
    example = find_example(OPENAPI, content)
    assert (example is None) == (route == BYTES), route
    if "schema" in content and example is not None:
        schema = content["schema"] | {"components": OPENAPI["components"]}
        jsonschema_rs.validate(schema, example)


@pytest.mark.parametrize("route", OPERATIONS)
def test_every_route_shows_what_it_answers(route: str) -> None:
    good = [answer for status, answer in OPERATIONS[route]["responses"].items() if status.startswith("2")]
    assert good
    for answer in good:
        assert answer.get("content"), route


def test_every_route_is_described_but_those_of_the_pages() -> None:
    described = {tuple(route.split(" ")) for route in OPERATIONS}
    served = {(method, re.sub(r":path}", "}", path)) for method, path in DECISIONS}
    pages = {("GET", "/"), ("GET", "/web/{name}"), ("GET", "/docs"), ("GET", "/openapi.json")}
    heads = {("HEAD", path) for method, path in served if method == "GET"}  # which a described GET has described
    assert described == served - pages - heads


def test_no_route_answers_422() -> None:
    assert not [
        path for path, methods in OPENAPI["paths"].items() for one in methods.values() if "422" in one["responses"]
    ]


def test_the_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "<h2><code>POST /v1/chat/completions</code></h2>" in page.text
    assert not re.search(r"<(script|link|img|iframe)\b|url\(", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_description_is_served(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json()["paths"].keys() == OPENAPI["paths"].keys()
    assert http.get("/redoc").status_code == 404
