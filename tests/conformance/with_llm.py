"""llm, the command, with models from `extra-openai-models.yaml`: of chats, of responses and of completions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checks import MAX_TOKENS, OVERSIZE, PERSON, QUESTION, TOO_LONG, Checks

checks = Checks()
world = checks.world
MODEL = world["model"]
ASKED = QUESTION[0]["content"]
FOLDER = tempfile.TemporaryDirectory(prefix="llm-")
HOME = Path(FOLDER.name)
GREEDY = ("-o", "temperature", "0", "-o", "max_tokens", str(MAX_TOKENS))
CHATS = ("chat", "responses")
WEATHER = 'def weather(city: str) -> str:\n    "The weather of a city."\n    return "dry"\n'


def configure() -> None:
    """The models and their keys, as a user of `llm` writes them."""
    able = {"supports_schema": True, "supports_tools": True}
    models = [
        declare("base", MODEL, **able),
        declare("chat", f"{MODEL}:introvert", **able),
        declare("responses", f"{MODEL}:introvert", responses=True, **able),
        declare("completion", f"{MODEL}:introvert", completion=True),
        declare("by-header", MODEL, headers={"X-Persona": "introvert"}),
        declare("nobody", f"{MODEL}:pirate"),
        declare("nobody-responses", f"{MODEL}:pirate", responses=True),
        declare("formal", f"{MODEL}:formal"),
    ]
    Path(HOME, "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    run("keys", "set", "masquerade", "--value", world["admin"])


def declare(model_id: str, name: str, **options: Any) -> dict[str, Any]:
    there = {"api_base": f"{world['url']}/v1", "api_key_name": "masquerade"}
    return {"model_id": model_id, "model_name": name, **there, **options}


def start(*arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; what is said is its standard input."""
    environment: Mapping[str, str] = {**os.environ, "LLM_USER_PATH": str(HOME), "PYTHONWARNINGS": "ignore"}
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    return subprocess.run(command, input=said or "", env=environment, capture_output=True, text=True, check=False)


def run(*arguments: str, said: str | None = None) -> str:
    done = start(*arguments, said=said)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def ask(model: str, *arguments: str, said: str = ASKED) -> str:
    return run("-m", model, *GREEDY, *arguments, said=said)


def fail(model: str, *arguments: str, said: str = ASKED) -> str:
    """What the command complains of."""
    done = start("-m", model, *GREEDY, *arguments, said=said)
    assert done.returncode, done.stdout
    return done.stderr


def logged() -> Any:
    """What the command's log has of the last answer."""
    return json.loads(run("logs", "--json", "-n", "1"))[0]


configure()


@checks.check("models")
def list_models() -> None:
    assert {"OpenAI Chat: chat", "OpenAI Completion: completion"} <= set(run("models").splitlines())


@checks.check("chat")
def chat() -> None:
    assert ask("chat", "--no-stream", "-o", "max_tokens", "40", "-o", "seed", "1", "-o", "stop", "\n")
    assert ask("completion", "--no-stream", "-o", "max_tokens", "8", said="On Sunday I like")
    first = ask("chat", "--no-stream")
    before = logged()
    assert before["response"].strip() == first
    assert run("-c", *GREEDY, "--no-stream", said="Why?")
    assert logged()["input_tokens"] > before["input_tokens"]


@checks.check("system and template")
def instruct() -> None:
    for model in CHATS:
        ask(model, "--no-stream")
        plain = logged()["input_tokens"]
        by_option = ask(model, "-s", "Be brief.", "--no-stream")
        assert logged()["input_tokens"] != plain  # some templates have a system message of their own
        run("-m", model, *GREEDY, "-s", "Be brief.", "--save", f"brief-{model}")
        assert run("-t", f"brief-{model}", said=ASKED) == by_option


@checks.check("persona")
def ask_persona() -> None:
    assert ask("chat") == ask("by-header") != ask("base")


@checks.check("stream")
def stream() -> None:
    for model in CHATS:
        assert ask(model) == ask(model, "--no-stream") != ""
    assert ask("completion", "-o", "max_tokens", "8") == ask("completion", "--no-stream", "-o", "max_tokens", "8")


@checks.check("usage")
def count() -> None:
    found = set()
    for model in CHATS:
        for option in ((), ("--no-stream",)):
            ask(model, *option)
            found.add((logged()["input_tokens"], logged()["output_tokens"]))
    assert len(found) == 1, found
    assert all(min(tokens) > 0 for tokens in found)


@checks.check("tools offered")
def offer_tools() -> None:
    """The command has no option for `tool_choice`, and small models call nothing by themselves."""
    for model in CHATS:
        ask(model, "--no-stream")
        plain = logged()["input_tokens"]
        assert ask(model, "--functions", WEATHER)  # the command reads no usage from a stream that was cut
        assert ask(model, "--functions", WEATHER, "--no-stream")
        assert logged()["input_tokens"] > plain


@checks.check("json_schema")
def fit_schema() -> None:
    for model in CHATS:
        for option in ((), ("--no-stream",)):
            person = json.loads(ask(model, "--schema", json.dumps(PERSON), *option))
            assert person["mood"] in ("calm", "wild")


@checks.check("responses")
def use_responses() -> None:
    assert ask("responses") == ask("chat")
    assert ask("responses", "--no-stream") == ask("chat")
    ask("responses")
    first = logged()
    assert run("-c", *GREEDY, said="Why?")
    assert (logged()["model"], logged()["conversation_id"]) == ("responses", first["conversation_id"])
    assert logged()["input_tokens"] > first["input_tokens"]


@checks.check("400")
def ask_nonsense() -> None:
    for model in CHATS:
        assert "maximum context length" in fail(model, said=TOO_LONG)
    assert "vocabulary" in fail("chat", "-o", "logit_bias", '{"999999": 5}')


@checks.check("401")
def show_no_key() -> None:
    for model in CHATS:
        assert "Incorrect API key" in fail(model, "--key", "sk-wrong")


@checks.check("403")
def ask_too_much() -> None:
    assert "may not use the name 'formal'" in fail("formal", "--key", world["limited"])


@checks.check("404")
def ask_nobody() -> None:
    for model in ("nobody", "nobody-responses"):
        assert "no persona 'pirate'" in fail(model)


@checks.check("413")
def send_too_much() -> None:
    assert "413" in fail("chat", said=OVERSIZE)


checks.run()
