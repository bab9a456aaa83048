"""Other people's clients against a real server. `python -m tests.conformance.run [--model M] [--only NAME] [--json]`.

Each client runs its script in an environment of its own (clients.py); one that cannot be installed is skipped. The
model is served by a process that has keys. A second one serves the same store, so that it does not work the jobs and
has to say so. Progress goes to stderr, the table to stdout; the exit status is 1 if a check failed or nothing was run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masquerade import demo
from masquerade.cli.stores import open_store
from masquerade.model import load
from tests.conformance.checks import MAX_TOKENS, PERSON, QUESTION, TOO_LONG, WEATHER
from tests.conformance.clients import CLIENTS, NotInstallable, find_command, find_openai, make_environment
from tests.keys.making import make_key
from tests.serving import serve

MODELS = ("demo", "smollm2")
EXAMPLES = {  # of checks.py, for clients in other languages
    "question": QUESTION,
    "person": PERSON,
    "weather": WEATHER,
    "too_long": TOO_LONG,
    "max_tokens": MAX_TOKENS,
}
SCRIPT_SECONDS = 1800.0


@dataclass
class Outcome:
    """What came of a client's checks: the error of each, or None; `openai` is the SDK that was installed with it, or
    `-`.
    """

    openai: str
    seconds: float
    checks: dict[str, str | None] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The checks that did not hold."""
        return [name for name, error in self.checks.items() if error]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", action="append", choices=CLIENTS, help="this client; may be repeated")
    options = parser.parse_args()
    folders, skipped = make_environments(options.only or list(CLIENTS))
    outcomes: dict[str, Outcome] = {}
    if folders:
        with start(options.model) as world:
            outcomes = {name: run(name, folder, world) for name, folder in folders.items()}
    print(json.dumps(as_json(outcomes, skipped)) if options.json else table(outcomes, skipped))
    return int(not outcomes or any(outcome.failed for outcome in outcomes.values()))


def make_environments(names: list[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders of clients, and why the others have none."""
    folders, skipped = {}, {}
    for name in names:
        try:
            folders[name] = make_environment(name)
        except NotInstallable as reason:
            skipped[name] = str(reason)
            tell(f"{name}: skipped, {reason}")
    return folders, skipped


@contextmanager
def start(model: str) -> Iterator[dict[str, Any]]:
    """Two servers of one store with keys; what the scripts are told of them."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        store = Path(folder, "store")
        prepare(model, store, Path(folder, "tokenizer"))
        keys = {
            "admin": make_key(store, "admin")[0],
            "limited": make_key(store, "chat", personas=("intro*",))[0],
        }
        # In bfloat16, which is what smollm2 is served in by default, an answer depends on whether its prompt is cached.
        arguments = ("--model", model, "--store", str(store), "--dtype", "float32")
        with serve(*arguments) as first, serve(*arguments) as second:
            tell(f"serving {model}")
            yield {
                **keys,
                "model": model,
                "url": first.base_url,
                "second": second.base_url,
                "data": str(demo.DATA),
                "tokenizer": str(Path(folder, "tokenizer")),
                "examples": EXAMPLES,
                "store": store,
            }


def prepare(model: str, store: Path, tokenizer: Path) -> None:
    """Save a model's tokenizer, and make its store, with the personas that ship."""
    base = load(model)
    base.tokenizer.save_pretrained(tokenizer)
    open_store(store, base.name, base.fingerprint)


def run(name: str, folder: Path, world: dict[str, Any]) -> Outcome:
    """Run a client's script. Each client has a hasty key of its own, so that none waits for another's minute."""
    hasty, _ = make_key(world["store"], "chat", rpm=1)
    told = {key: value for key, value in world.items() if key != "store"} | {"name": f"by-{name}", "hasty": hasty}
    started = time.monotonic()
    done = subprocess.run(
        [*find_command(CLIENTS[name], folder), json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=SCRIPT_SECONDS,
        check=False,
    )
    outcome = Outcome(find_openai(CLIENTS[name], folder), round(time.monotonic() - started, 1))
    for line in done.stdout.splitlines():
        if line.startswith('{"check"'):
            found = json.loads(line)
            outcome.checks[found["check"]] = found["error"]
    if done.returncode or not outcome.checks:
        outcome.checks["script"] = f"exit status {done.returncode}: {done.stderr[-2000:]}"
    tell(f"{name}: {len(outcome.checks)} checks in {outcome.seconds} s, failed: {outcome.failed or 'none'}")
    if outcome.failed:
        tell(done.stderr)
    return outcome


def as_json(outcomes: dict[str, Outcome], skipped: dict[str, str]) -> dict[str, Any]:
    clients = {
        name: {"packages": CLIENTS[name].packages, **vars(outcome), "failed": outcome.failed}
        for name, outcome in outcomes.items()
    }
    ok = bool(outcomes) and not any(outcome.failed for outcome in outcomes.values())
    return {"ok": ok, "clients": clients, "skipped": skipped}


def table(outcomes: dict[str, Outcome], skipped: dict[str, str]) -> str:
    """Markdown: a row for each client; checks that failed are bold."""
    rows = [["client", "openai SDK inside", "checks", "passed", "s"], ["---"] * 5]
    for name, outcome in outcomes.items():
        checks = ", ".join(f"**{check}**" if error else check for check, error in outcome.checks.items())
        passed = f"{len(outcome.checks) - len(outcome.failed)} of {len(outcome.checks)}"
        rows.append([CLIENTS[name].label, outcome.openai, checks, passed, f"{outcome.seconds:.0f}"])
    rows += [[CLIENTS[name].label, "-", f"skipped: {reason}", "-", "-"] for name, reason in skipped.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
