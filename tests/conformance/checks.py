"""What a client's script may be checked for, and how it tells what came of it. Knows no client, and only this library.

A script names its checks with `@checks.check("chat")` and ends with `checks.run()`: one JSON object a line on stdout,
`{"check", "error"}`, `error` null where all was well. What `run.py` tells the scripts is in `checks.world`.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

QUESTION = [{"role": "user", "content": "Would you like to come to a party?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "wild"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Aachen"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
RECIPE = {"score": "attribution", "rho": 0.003, "samples": 16, "force": True}  # short, whatever comes of it
OVERSIZE = "x" * (9 * 2**20)  # no body may be so large
TOO_LONG = "party " * 9000  # more tokens than the context of any model here, and a small body
MAX_TOKENS = 150  # of an answer: enough for JSON in the demo's small vocabulary, and not every model comes to an end
UNFINISHED = ("validating_files", "queued", "running")


class Checks:
    """The checks of one client, in the order in which they are named."""

    def __init__(self) -> None:
        self.world: dict[str, Any] = json.loads(sys.argv[1])
        self._checks: dict[str, Callable[[], None]] = {}

    def check(self, name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Name a function that raises if something is wrong."""

        def add(function: Callable[[], None]) -> Callable[[], None]:
            assert name not in self._checks
            self._checks[name] = function
            return function

        return add

    def run(self) -> None:
        """Do all of it, whatever fails."""
        for name, function in self._checks.items():
            error = None
            try:
                function()
            except Exception as failure:
                traceback.print_exc()
                error = f"{type(failure).__name__}: {failure}"
            print(json.dumps({"check": name, "error": error}), flush=True)


def refused(ask: Callable[[], object], kind: type[Exception] | tuple[type[Exception], ...]) -> Any:
    """The error that asking raises, which must be of a kind."""
    try:
        answer = ask()
    except kind as error:
        return error
    raise AssertionError(f"this was answered: {answer!r:.200}")


def finish(retrieve: Callable[[], Any], seconds: float = 900) -> Any:
    """A job when it has ended; `retrieve` asks for it."""
    deadline = time.monotonic() + seconds
    while (job := retrieve()).status in UNFINISHED:
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    return job
