"""Requests that nobody would write, made from the OpenAPI description by schemathesis, against a real server process.

`python -m tests.fuzzing.run [--examples 200] [--json]`. Two kinds of cases for every route: the limits of each field
(coverage), and random ones (so many as `--examples` says), some of them with what must be refused. Where the
description says any text, the names of personas and files that exist are likely, so that requests get further than a
404. Every answer must be one that the description has: its status, its content type, its schema; never a 5xx but those
that say that the server is not ready or full. Prints how many cases there were; the exit status is 1 if anything was
wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from schemathesis import engine
from schemathesis.engine import events

from tests.keys.making import bearer, make_key
from tests.serving import serve

SEED = 8
PERSONAS = ("introvert", "extravert", "formal", "casual")
LINES = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": said}]}) + "\n"
    for number, said in enumerate(("Yes.", "No.", "Perhaps.", "Never."))
)
Json = dict[str, Any]


@dataclass
class Outcome:
    """What came of a run: cases by phase, answers by status, and each kind of failure once."""

    cases: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    routes: int = 0
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Requests that were answered."""
        return self.answers.total()


@schemathesis.check
def error_has_openai_form(ctx: Any, response: Any, case: Any) -> None:
    """Every answer has an id, and every refusal the one body that OpenAI's clients read, or Anthropic's."""
    assert response.headers.get("x-request-id"), "an answer without x-request-id"
    if response.status_code >= 400:
        error = response.json()["error"]
        details = {"details"} if "details" in error else {"param", "code"}
        assert error.keys() == {"message", "type", *details}, error
        assert "Traceback" not in error["message"], error


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="random cases for each route")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with start() as (url, key):
        outcome = fuzz(url, key, options.examples)
    if options.json:
        print(json.dumps(asdict(outcome) | {"total": outcome.total}))
    else:
        print(summary(outcome))
    return int(bool(outcome.failures))


@contextmanager
def start() -> Iterator[tuple[str, str]]:
    """A server of the demo with a key that may do everything; its address and the key."""
    with tempfile.TemporaryDirectory(prefix="fuzzing-") as folder:
        store = Path(folder, "store")
        key, _ = make_key(store, "admin")
        with serve("--model", "demo", "--store", str(store)) as server:
            yield server.base_url, key


def fuzz(url: str, key: str, examples: int, *, coverage: bool = True) -> Outcome:
    """Ask a server everything that its description allows, and some of what it does not."""
    with httpx.Client(base_url=url, headers=bearer(key), timeout=60) as http:
        described = http.get("/openapi.json").json()
        file_id = upload(http)
        job_id = queue(http, file_id)
        asked = {"model": "demo", "input": "Hi.", "max_output_tokens": 2}
        response_id = str(http.post("/v1/responses", json=asked).raise_for_status().json()["id"])
        batch_id, requests_id = send_batch(http)
    models, personas = ["demo", "demo:introvert", "demo:formal"], list(PERSONAS)
    known = {"model": models, "persona": personas, "name": personas, "other": personas, "expression": personas}
    known |= {"training_file": [file_id], "contrast_file": [file_id], "file_id": [file_id], "job_id": [job_id]}
    known |= {"response_id": [response_id], "previous_response_id": [response_id]}
    known |= {"batch_id": [batch_id], "input_file_id": [requests_id]}
    config = schemathesis.Config.from_dict(settings(url, key, examples, coverage=coverage))
    schema = schemathesis.openapi.from_dict(suggest(described, known), config=config)
    outcome, started = Outcome(), time.monotonic()
    for event in engine.from_schema(schema).execute():
        note(outcome, event)
    outcome.seconds = round(time.monotonic() - started, 1)
    outcome.routes = sum(1 for methods in described["paths"].values() for _ in methods)
    return outcome


def settings(url: str, key: str, examples: int, *, coverage: bool) -> Json:
    """schemathesis' configuration."""
    return {
        "base-url": url,
        "headers": bearer(key),
        "seed": SEED,
        "continue-on-failure": True,
        "request-timeout": 120,
        "generation": {"max-examples": examples, "no-shrink": True, "deterministic": True, "database": "none"},
        "phases": {
            "examples": {"enabled": True},
            "coverage": {"enabled": coverage},
            "fuzzing": {"enabled": True},
            "stateful": {"enabled": False},
        },
        "checks": {
            "not_a_server_error": {"expected-statuses": ["2XX", "4XX", 503, 507]},
            # What exists changes while the requests run, and unknown fields are ignored on purpose.
            "positive_data_acceptance": {"enabled": False},
            "negative_data_rejection": {"enabled": False},
            "ensure_resource_availability": {"enabled": False},
            "use_after_free": {"enabled": False},
        },
        # This path is also that of a persona who is called so, with what may be done to one.
        "operations": [
            {"include-path": "/v1/personas/compose", "checks": {"allow_header_conformance": {"enabled": False}}}
        ],
    }


def upload(http: httpx.Client) -> str:
    """The id of a small file to build from."""
    sent = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("lines.jsonl", LINES.encode())})
    return str(sent.raise_for_status().json()["id"])


def queue(http: httpx.Client, file_id: str) -> str:
    """The id of a job that ends at once: there are events to tell, and nothing is built meanwhile."""
    body = {"model": "demo", "training_file": file_id, "suffix": "never"}
    job = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
    http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")  # unless it has failed already
    return str(job["id"])


def send_batch(http: httpx.Client) -> tuple[str, str]:
    """The ids of a batch of one request, and of its file."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "I"}}
    sent = {"file": ("requests.jsonl", json.dumps(line).encode())}
    file_id = str(http.post("/v1/files", data={"purpose": "batch"}, files=sent).raise_for_status().json()["id"])
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    return str(http.post("/v1/batches", json=body).raise_for_status().json()["id"]), file_id


def suggest(described: Json, known: dict[str, list[str]]) -> Json:
    """The description, in which fields and parameters of some names may be one of the known values, too."""

    def widen(name: str, schema: Json) -> Json:
        return {"anyOf": [{"enum": known[name]}, schema]} if name in known else schema

    for schema in described["components"]["schemas"].values():
        fields = schema.get("properties", {})
        fields.update({name: widen(name, one) for name, one in fields.items()})
    for methods in described["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = widen(parameter["name"], parameter["schema"])
    return described


def note(outcome: Outcome, event: Any) -> None:
    """Enter what happened."""
    if isinstance(event, events.ScenarioFinished):
        for interaction in event.recorder.interactions.values():
            outcome.cases[event.phase.value] += 1
            if interaction.response is not None:
                outcome.answers[interaction.response.status_code] += 1
            else:
                outcome.failures[f"{event.label}: no answer"] = str(interaction.request)[:1000]
        for checked in event.recorder.checks.values():
            for one in checked:
                if one.failure_info is not None:
                    failure = one.failure_info.failure
                    said = f"{failure.title}: {failure.message}\n{one.failure_info.code_sample}"
                    outcome.failures.setdefault(f"{event.label}: {one.name}: {failure.title}", said[:3000])
    elif isinstance(event, events.NonFatalError):
        outcome.failures[f"{event.label}: {type(event.value).__name__}"] = str(event.value)[:2000]
    elif isinstance(event, events.FatalError):
        raise event.exception


def summary(outcome: Outcome) -> str:
    lines = [f"{outcome.total} cases on {outcome.routes} routes in {outcome.seconds:.0f} s"]
    lines.append("phases: " + ", ".join(f"{name} {count}" for name, count in outcome.cases.items()))
    lines.append("answers: " + ", ".join(f"{status} {count}" for status, count in sorted(outcome.answers.items())))
    lines += [f"\n{name}\n{said}" for name, said in outcome.failures.items()]
    return "\n".join([*lines, f"{len(outcome.failures)} kinds of failure"])


if __name__ == "__main__":
    sys.exit(main())
