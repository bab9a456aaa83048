"""guidellm: short benchmarks with streams, each after guidellm's own request of `/health`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import Checks

checks = Checks()
world = checks.world
MODEL = world["model"]
REQUESTS, TOKENS = 3, 8


def benchmark(model: str, path: str) -> dict[str, Any]:
    """The report of a few requests, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        backend = {"kind": "openai_http", "target": world["url"], "model": model, "api_key": world["admin"]}
        backend["request_format"] = path
        data = {"kind": "synthetic_text", "prompt_tokens": 16, "output_tokens": TOKENS}
        command = [Path(sys.executable).with_name("guidellm"), "run", "--disable-console"]
        options = {
            "--backend": backend,
            "--profile": {"kind": "synchronous"},
            "--constraint": {"kind": "max_requests", "count": REQUESTS},
            "--tokenizer": {"kind": "huggingface_auto", "model": world["tokenizer"]},
            "--data": data,
            "--output": {"kind": "json", "path": str(report)},
        }
        given = [part for name, value in options.items() for part in (name, json.dumps(value))]
        done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        loaded: dict[str, Any] = json.loads(report.read_text())
        return loaded


def finish(path: str, model: str = f"{MODEL}:introvert") -> dict[str, Any]:
    """The metrics of a benchmark without errors, each of whose answers had as many tokens as were asked for."""
    (found,) = benchmark(model, path)["benchmarks"]
    metrics: dict[str, Any] = found["metrics"]
    errors = [one["info"]["error"] for one in found["requests"]["errored"]]
    assert metrics["request_totals"]["successful"] == REQUESTS, (metrics["request_totals"], errors)
    assert metrics["output_token_count"]["successful"]["mean"] == TOKENS
    return metrics


@checks.check("chat")
def measure_chats() -> None:
    finish("/v1/chat/completions")


@checks.check("stream")
def measure_streams() -> None:
    """Times between tokens are known from streams only."""
    metrics = finish("/v1/completions")
    assert metrics["inter_token_latency_ms"]["successful"]["mean"] > 0


checks.run()
