"""What the tests of building ask a server for, with OpenAI's SDK. Knows the demo's files; refuses to judge answers."""

from __future__ import annotations

import time
from typing import Any

from openai import OpenAI

from masquerade import demo
from tests.serving import Server

RECIPE = {"score": "attribution", "rho": 0.003}
QUICK = {"samples": 32, "force": True}  # with these a build ends in seconds, and what the mask does is left open
UNFINISHED = ("validating_files", "queued", "running")


def connect(server: Server, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 120} | options)


def upload(sdk: OpenAI, *names: str) -> list[str]:
    """The ids of some of the demo's files."""
    return [sdk.files.create(file=demo.DATA / f"{name}.jsonl", purpose="fine-tune").id for name in names]


def build(sdk: OpenAI, name: str, pair: tuple[str, str] = ("formal", "casual"), **mask: Any) -> Any:
    """Queue the build of a persona from two of the demo's files; the job."""
    training, contrast, facts = upload(sdk, *(f"{side}.train" for side in pair), "facts")
    return order(sdk, name, training, RECIPE | {"contrast_file": contrast, "neutral_file": facts} | mask)


def order(sdk: OpenAI, name: str, training: str, mask: dict[str, Any], **more: Any) -> Any:
    body = {"method": {"type": "mask", "mask": mask}}
    return sdk.fine_tuning.jobs.create(model="demo", training_file=training, suffix=name, extra_body=body, **more)


def is_unfinished(sdk: OpenAI, job_id: str) -> bool:
    return sdk.fine_tuning.jobs.retrieve(job_id).status in UNFINISHED


def finish(sdk: OpenAI, job_id: str, seconds: float = 240) -> Any:
    """The job when it has ended."""
    deadline = time.monotonic() + seconds
    while is_unfinished(sdk, job_id):
        assert time.monotonic() < deadline, sdk.fine_tuning.jobs.retrieve(job_id)
        time.sleep(0.1)
    return sdk.fine_tuning.jobs.retrieve(job_id)


def ask(sdk: OpenAI, model: str, question: str = "Could you help me with my luggage?") -> str:
    """A greedy answer."""
    asked: Any = [{"role": "user", "content": question}]
    said = sdk.chat.completions.create(model=model, messages=asked, temperature=0).choices[0].message.content
    assert said
    return said
