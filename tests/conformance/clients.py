"""The clients of the suite, and their environments: a folder each under `.conformance`, filled by pip or npm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".conformance"


class NotInstallable(Exception):
    """A client that cannot be had on this machine; the message says why."""


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


CLIENTS = {
    "openai-3": Client("with_openai", ("openai==3.54.0",)),
    "openai-2": Client("with_openai", ("openai==2.54.0",)),
    "openai-agents": Client("with_openai_agents", ("openai-agents==0.24.0",)),
    "langchain": Client("with_langchain", ("langchain-openai==1.7.3",)),
    "litellm": Client("with_litellm", ("litellm==1.106.2", "mcp==2.3.0")),
    "litellm-proxy": Client("with_litellm_proxy", ("litellm[proxy]==1.106.2",)),
    "instructor": Client("with_instructor", ("instructor==1.17.0",)),
    "llama-index": Client("with_llama_index", ("llama-index-llms-openai-like==0.8.1",)),
    "pydantic-ai": Client("with_pydantic_ai", ("pydantic-ai-slim[openai]==2.68.0",)),
    "llm": Client("with_llm", ("llm==0.36",)),
    "openai-node": Client("with_openai_node", ("openai==6.49.0",), npm=True),
    "vercel-ai": Client(
        "with_vercel_ai",
        ("ai==6.0.326", "@ai-sdk/openai==3.0.141", "@ai-sdk/openai-compatible==2.0.92", "zod==4.6.7"),
        npm=True,
    ),
    "anthropic-2": Client("with_anthropic", ("anthropic==2.14.0",)),
    "anthropic-0": Client("with_anthropic", ("anthropic==0.125.0",)),
    "guidellm": Client("with_guidellm", ("guidellm==0.8.1", "torch==2.13.0")),
    "lm-eval": Client("with_lm_eval", ("lm-eval[api]==0.4.13", "transformers==5.23.0")),
}


def make_environment(name: str) -> Path:
    """The folder of a client's environment, which is made anew when its versions have changed.

    Raises `NotInstallable`.
    """
    client, folder = CLIENTS[name], ENVIRONMENTS / name
    lacking = [program for program in ("node", "npm") if client.npm and not shutil.which(program)]
    if lacking:
        raise NotInstallable(f"there is no {' and no '.join(lacking)} on the PATH")
    marker, wanted = folder / "installed", "\n".join(client.packages)
    if not (marker.exists() and marker.read_text() == wanted):
        print(f"{name}: installing {', '.join(client.packages)}", file=sys.stderr, flush=True)
        (_install_from_npm if client.npm else _install_from_pypi)(folder, client.packages)
        marker.write_text(wanted)
    return folder


def _install_from_pypi(folder: Path, packages: tuple[str, ...]) -> None:
    venv.create(folder, clear=True, with_pip=True)
    _install([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], folder)


def _install_from_npm(folder: Path, packages: tuple[str, ...]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = {"private": True, "dependencies": dict(package.split("==") for package in packages)}
    (folder / "package.json").write_text(json.dumps(wanted))
    _install(["npm", "install", "--no-audit", "--no-fund", "--loglevel", "error"], folder)


def _install(command: list[str | Path], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        *_, reason = ["no message", *(line for line in done.stderr.splitlines() if "ERR" in line.upper())]
        raise NotInstallable(f"{Path(command[0]).name} ended with {done.returncode}: {reason[:300]}")


def find_command(client: Client, folder: Path) -> list[str | Path]:
    """What runs a client's script. Node looks for packages beside a script, so it gets copies."""
    if not client.npm:
        return [folder / "bin/python", "-W", "ignore", HERE / f"{client.script}.py"]
    for script in HERE.glob("*.mjs"):
        shutil.copy(script, folder)
    return ["node", folder / f"{client.script}.mjs"]


def find_openai(client: Client, folder: Path) -> str:
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
