"""Renders the OpenAPI description as `/docs` and, by `make docs`, as `docs/api.md`."""

# FastAPI's Swagger and Redoc pages load their scripts from a CDN, which offline servers and the page's CSP rule out.

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from markdown_it import MarkdownIt

from masquerade import __version__

router = APIRouter(include_in_schema=False)

Json = Mapping[str, Any]
_OPENING = """# The interface

Written by `make docs` from the server's OpenAPI description, which is at `/openapi.json`; a running server shows this
page at `/docs`.

Every failure has the body `{"error": {"message", "type", "param", "code"}}`, every answer the header `x-request-id`.
On `/v1/messages` and below, a failure has Anthropic's body: `{"type": "error", "error": {"type", "message", "details":
{"error_code", "param"}}, "request_id"}`.
Fields that are not listed are ignored, unless they would change the answer; those are refused by name.
"""
_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
td, th { border: 1px solid #8884; padding: .2rem .6rem; text-align: left; vertical-align: top }
pre { background: #8881; padding: .8rem; overflow-x: auto } code { font-size: .9em } h2 { margin-top: 3rem }
:root { color-scheme: light dark }"""


@router.get("/docs")
def show_reference(http: Request) -> HTMLResponse:
    """The interface as a page."""
    app: FastAPI = http.app
    policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
    return HTMLResponse(_page(json.dumps(app.openapi())), headers=policy)


@cache
def _page(openapi: str) -> str:
    text = MarkdownIt("commonmark", {"html": False}).enable("table").render(write(json.loads(openapi)))
    head = f'<meta charset="utf-8"><title>Masquerade {__version__}: the interface</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{text}</body></html>'


def write(openapi: Json) -> str:
    """The Markdown of a description: for each route its purpose, parameters, body and response, with examples."""
    return "\n".join([_OPENING, *_table_of_contents(openapi), *_operation_sections(openapi)]).rstrip() + "\n"


class DocumentedAPI(FastAPI):
    """An application whose OpenAPI examples keep their null fields; the framework drops them."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description."""
        if not self.openapi_schema:
            openapi = super().openapi()
            for schema in openapi["components"]["schemas"].values():
                if "example" in schema:
                    _restore_nulls(openapi, schema, schema["example"])
        return super().openapi()


def _restore_nulls(openapi: Json, schema: Json, value: Any) -> None:
    """Add null to an example for each required nullable field that it lacks."""
    for one in (_resolve(openapi, one) for one in schema.get("anyOf", (schema,))):
        if isinstance(value, list):
            for item in value:
                _restore_nulls(openapi, one.get("items", {}), item)
        elif isinstance(value, dict):
            for name, field in one.get("properties", {}).items():
                if name in value:
                    _restore_nulls(openapi, field, value[name])
                elif name in one.get("required", ()) and _may_be_null(field):
                    value[name] = None


def _may_be_null(schema: Json) -> bool:
    return any(one.get("type") == "null" for one in schema.get("anyOf", (schema,)))


def _operations(openapi: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def _table_of_contents(openapi: Json) -> Iterator[str]:
    yield "| route | |\n|---|---|"
    for method, path, operation in _operations(openapi):
        yield f"| `{method} {path}` | {_description(operation).split('. ')[0].rstrip('.')} |"


def _operation_sections(openapi: Json) -> Iterator[str]:
    for method, path, operation in _operations(openapi):
        yield f"\n## `{method} {path}`\n\n{_description(operation)}"
        if parameters := [one for one in operation.get("parameters", ()) if not one["name"].startswith("x-stainless")]:
            yield "\n| parameter | in | type | |\n|---|---|---|---|"
            for one in parameters:
                need = "required" if one.get("required") else one.get("description", "")
                yield f"| `{one['name']}` | {one['in']} | {_type(openapi, one['schema'])} | {need} |"
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            yield f"\nBody, `{kind}`:\n"
            yield from _describe(openapi, content)
        for status, response in operation["responses"].items():
            if not status.startswith("2"):
                continue
            contents = response.get("content", {})
            for kind, content in contents.items():
                yield f"\nAnswer {status}, `{kind}`:\n"
                yield from _describe(openapi, content)
            if not contents:
                yield f"\nAnswer {status}."


def _describe(openapi: Json, content: Json) -> Iterator[str]:
    """Fields and example of a body."""
    schema = _resolve(openapi, content.get("schema", {}))
    if fields := schema.get("properties"):
        yield "| field | type | |\n|---|---|---|"
        for name, field in fields.items():
            need = "required" if name in schema.get("required", ()) else ""
            yield f"| `{name}` | {_type(openapi, field)} | {need} |"
    example = find_example(openapi, content)
    if example is not None:
        text = example if isinstance(example, str) else json.dumps(example, indent=2, ensure_ascii=False)
        yield f"\n```{'text' if isinstance(example, str) else 'json'}\n{text.rstrip()}\n```"


def find_example(openapi: Json, content: Json) -> Any:
    """The example of a body, or None; for a list, one made of the example of its items."""
    schema = _resolve(openapi, content.get("schema", {}))
    fields = schema.get("properties", {})
    example = content.get("example", schema.get("example"))
    if example is None and "data" in fields:
        listed = _resolve(openapi, fields["data"].get("items", {})).get("example")
        more = {"has_more": False} if "has_more" in fields else {}
        example = {"object": "list", "data": [listed], **more} if listed else None
    return example


def _resolve(openapi: Json, schema: Json) -> Json:
    while reference := schema.get("$ref"):
        schema = openapi["components"]["schemas"][reference.rpartition("/")[2]]
    return schema


def _type(openapi: Json, schema: Json) -> str:
    """A short description of a type."""
    if "$ref" in schema:
        resolved = _resolve(openapi, schema)
        return "object" if "properties" in resolved else _type(openapi, resolved)
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " \\| ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(openapi, one) for one in schema[union]))
    if schema.get("type") == "array":
        return f"array of {_type(openapi, schema.get('items', {}))}"
    minimum = schema.get("minimum", schema.get("exclusiveMinimum"))
    maximum = schema.get("maximum", schema.get("exclusiveMaximum"))
    limits = f" from {minimum:g}" if minimum is not None else ""
    limits += f" to {maximum:g}" if maximum is not None else ""
    return f"{schema.get('type', 'any')}{limits}"


def _description(operation: Json) -> str:
    text: str = " ".join(operation.get("description", operation.get("summary", "")).split())
    return text
