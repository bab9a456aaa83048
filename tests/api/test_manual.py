"""The interface describes itself, and the description in the repository is the present one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade.api.app import describe
from masquerade.api.manual import find_example, write

API_MD = Path(__file__).parents[2] / "docs" / "api.md"
OPENAPI: dict[str, Any] = describe().openapi()
BODIES = [
    (f"{method} {path}", content)
    for path, methods in OPENAPI["paths"].items()
    for method, operation in methods.items()
    for part in (operation.get("requestBody", {}), *(operation["responses"][s] for s in operation["responses"]))
    for kind, content in part.get("content", {}).items()
    if kind == "application/json"
]


def test_the_manual_in_the_repository_is_what_make_docs_writes() -> None:
    assert API_MD.read_text(encoding="utf-8") == write(OPENAPI), "run `make docs`"


@pytest.mark.parametrize(("route", "content"), BODIES, ids=[route for route, _ in BODIES])
def test_every_body_and_every_answer_has_an_example(route: str, content: dict[str, Any]) -> None:
    assert find_example(OPENAPI, content) is not None, route


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
