"""Other people's clients against a real server. `python -m tests.conformance.run [--json] [--only NAME]`.

Each client gets an environment of its own under `.conformance`, made by pip or npm from the registry and kept until its
versions below change, and runs its script there. Without node, its clients are skipped. The demo is served by a process
that has keys; a second one serves the same store, so that it does not work the jobs and has to say so. Progress goes to
stderr, the table to stdout; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masquerade import demo
from tests.conformance.checks import PERSON, QUESTION, WEATHER
from tests.keys.making import make_key
from tests.serving import serve

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".conformance"
SCRIPT_SECONDS = 600.0


@dataclass(frozen=True)
class Client:
    """A client: its script here, and what is installed for it, from PyPI or from npm."""

    script: str
    packages: tuple[str, ...]
    npm: bool = False

    @property
    def label(self) -> str:
        """As the table calls it."""
        return " + ".join(self.packages).replace("==", " ") + (" (npm)" if self.npm else "")

    @property
    def obstacle(self) -> str | None:
        """What it needs that this machine does not have."""
        lacking = [program for program in ("node", "npm") if self.npm and not shutil.which(program)]
        return f"there is no {' and no '.join(lacking)} on the PATH" if lacking else None


CLIENTS = {
    "openai-3": Client("with_openai", ("openai==3.54.0",)),
    "openai-2": Client("with_openai", ("openai==2.54.0",)),
    "openai-agents": Client("with_openai_agents", ("openai-agents==0.24.0",)),
    "langchain": Client("with_langchain", ("langchain-openai==1.7.3",)),
    "litellm": Client("with_litellm", ("litellm==1.106.2", "mcp==2.3.0")),
    "instructor": Client("with_instructor", ("instructor==1.17.0",)),
    "llama-index": Client("with_llama_index", ("llama-index-llms-openai-like==0.8.1",)),
    "pydantic-ai": Client("with_pydantic_ai", ("pydantic-ai-slim[openai]==2.68.0",)),
    "llm": Client("with_llm", ("llm==0.36",)),
    "openai-node": Client("with_openai_node", ("openai==6.49.0",), npm=True),
    "anthropic-2": Client("with_anthropic", ("anthropic==2.14.0",)),
    "anthropic-0": Client("with_anthropic", ("anthropic==0.125.0",)),
    "guidellm": Client("with_guidellm", ("guidellm==0.8.1", "torch==2.13.0")),
    "lm-eval": Client("with_lm_eval", ("lm-eval[api]==0.4.13", "transformers==5.23.0")),
}


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
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", action="append", choices=CLIENTS, help="this client; may be repeated")
    options = parser.parse_args()
    names = options.only or list(CLIENTS)
    for name in names:
        if CLIENTS[name].obstacle:
            tell(f"{name}: skipped, {CLIENTS[name].obstacle}")
    folders = {name: make_environment(name, CLIENTS[name]) for name in names if not CLIENTS[name].obstacle}
    with start() as world:
        outcomes = {name: run(name, folder, world) for name, folder in folders.items()}
    print(json.dumps(as_json(outcomes)) if options.json else table(outcomes))
    return int(any(outcome.failed for outcome in outcomes.values()))


def make_environment(name: str, client: Client) -> Path:
    """The folder of a client's environment, which is made anew when its versions have changed."""
    folder = ENVIRONMENTS / name
    marker, wanted = folder / "installed", "\n".join(client.packages)
    if not (marker.exists() and marker.read_text() == wanted):
        tell(f"{name}: installing {', '.join(client.packages)}")
        (install_from_npm if client.npm else install_from_pypi)(folder, client.packages)
        marker.write_text(wanted)
    return folder


def install_from_pypi(folder: Path, packages: tuple[str, ...]) -> None:
    venv.create(folder, clear=True, with_pip=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)


def install_from_npm(folder: Path, packages: tuple[str, ...]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = {"private": True, "dependencies": dict(package.split("==") for package in packages)}
    (folder / "package.json").write_text(json.dumps(wanted))
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


@contextmanager
def start() -> Iterator[dict[str, Any]]:
    """Two servers of one store with keys; what the scripts are told of them."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        store = Path(folder, "store")
        keys = {
            "admin": make_key(store, "admin")[0],
            "limited": make_key(store, "chat", personas=("intro*",))[0],
        }
        arguments = ("--model", "demo", "--store", str(store))
        with serve(*arguments) as first, serve(*arguments) as second:
            tell("serving")
            yield {
                **keys,
                "url": first.base_url,
                "second": second.base_url,
                "data": str(demo.DATA),
                "tokenizer": str(demo.MODEL),
                "examples": {"question": QUESTION, "person": PERSON, "weather": WEATHER},
                "store": store,
            }


def run(name: str, folder: Path, world: dict[str, Any]) -> Outcome:
    """Run a client's script. Each client has a hasty key of its own, so that none waits for another's minute."""
    hasty, _ = make_key(world["store"], "chat", rpm=1)
    told = {key: value for key, value in world.items() if key != "store"} | {"name": f"by-{name}", "hasty": hasty}
    started = time.monotonic()
    done = subprocess.run(
        [*command(CLIENTS[name], folder), json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=SCRIPT_SECONDS,
        check=False,
    )
    outcome = Outcome(installed(CLIENTS[name], folder), round(time.monotonic() - started, 1))
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


def command(client: Client, folder: Path) -> list[str | Path]:
    """What runs a client's script. Node looks for packages beside a script, so it gets copies."""
    if not client.npm:
        return [folder / "bin/python", "-W", "ignore", HERE / f"{client.script}.py"]
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, folder)
    return ["node", folder / f"{client.script}.mjs"]


def installed(client: Client, folder: Path) -> str:
    """The version of the openai SDK in an environment; `-` without it."""
    if client.npm:
        package = folder / "node_modules" / "openai" / "package.json"
        return str(json.loads(package.read_text())["version"]) if package.exists() else "-"
    asked = (
        "from importlib.metadata import distributions as all; print(*[d.version for d in all(name='openai')] or '-')"
    )
    return subprocess.run(
        [folder / "bin/python", "-c", asked], capture_output=True, text=True, check=True
    ).stdout.strip()


def as_json(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    clients = {
        name: {"packages": CLIENTS[name].packages, **vars(outcome), "failed": outcome.failed}
        for name, outcome in outcomes.items()
    }
    return {"ok": not any(outcome.failed for outcome in outcomes.values()), "clients": clients}


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: a row for each check, a column for each client."""
    checks = list(dict.fromkeys(check for outcome in outcomes.values() for check in outcome.checks))
    rows = [["", *(CLIENTS[name].label for name in outcomes)], ["---"] * (len(outcomes) + 1)]
    rows.append(["openai SDK inside", *(outcome.openai for outcome in outcomes.values())])
    rows += [[check, *(mark(outcome, check) for outcome in outcomes.values())] for check in checks]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mark(outcome: Outcome, check: str) -> str:
    if check not in outcome.checks:
        return "-"
    return "**failed**" if outcome.checks[check] else "yes"


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
