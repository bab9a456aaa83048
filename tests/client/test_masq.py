"""The `masq` command as its users run it: in a pipe, and in a terminal of its own."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade import demo
from masquerade.cluster import metrics
from masquerade_client import Certificate
from masquerade_client._types import BuildEvent
from masquerade_client.cli.options import plain
from masquerade_client.cli.personas import _measured, tabulate
from masquerade_client.cli.top import parse, summarise
from tests.client.scripted import Handler, Script, scripted, stream_forever
from tests.keys.making import make_key
from tests.serving import Server, serve
from tests.world import CERTIFICATE, CURVE, make_claim

COMMAND = [sys.executable, "-m", "masquerade_client.cli"]
BUILD = ("--contrast", str(demo.DATA / "casual.train.jsonl"), "--neutral", str(demo.DATA / "facts.jsonl"))
QUICK = ("--score", "attribution", "--rho", "0.003", "--phase", "all", "--samples", "48", "--force")
PATIENCE = 120.0  # seconds until a terminal that is silent has failed


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--model", "demo") as server:
        yield server


def run(server: Server, *words: str, input: str = "") -> subprocess.CompletedProcess[str]:  # noqa: A002
    environment = {**os.environ, "MASQUERADE_URL": server.base_url, "NO_COLOR": "1", "COLUMNS": "100"}
    return subprocess.run([*COMMAND, *words], env=environment, input=input, capture_output=True, text=True, timeout=280)


def read(outcome: subprocess.CompletedProcess[str]) -> Any:
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


NOWHERE = "http://127.0.0.1:1"  # nothing listens there
PLACES = [
    (("--url", "{url}", "--json", "personas"), {}),
    (("personas", "--url", "{url}", "--json"), {}),
    (("--url", "{url}", "personas", "--json"), {}),
    (("--json", "personas"), {"MASQUERADE_URL": "{url}"}),
    (("--url", "{url}", "--json", "personas"), {"MASQUERADE_URL": NOWHERE}),
    (("personas", "--url", "{url}", "--json"), {"MASQUERADE_URL": NOWHERE}),
    (("--url", NOWHERE, "personas", "--url", "{url}", "--json"), {}),  # the nearer one counts
]


@pytest.mark.parametrize(("words", "environment"), PLACES)
def test_options_stand_before_the_command_or_after_it(
    server: Server, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    given = {name: value.format(url=server.base_url) for name, value in environment.items()}
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MASQUERADE_")}
    command = [*COMMAND, *(word.format(url=server.base_url) for word in words)]
    outcome = subprocess.run(command, env=bare | given, capture_output=True, text=True, timeout=60)
    assert len(read(outcome)["personas"]) == 8


def test_a_key_before_the_command_is_sent(tiny_folder: Path, tmp_path: Path) -> None:
    token, _ = make_key(tmp_path, "chat")
    with serve("--model", str(tiny_folder), "--store", str(tmp_path)) as keyed:
        assert run(keyed, "personas", "--json").returncode != 0
        for words in (("--key", token, "personas"), ("personas", "--key", token)):
            assert read(run(keyed, "--json", *words)) == {"personas": []}


@pytest.mark.parametrize("line", ["masq --url {url} personas g", "masq personas --url {url} g", "masq personas g"])
def test_a_shell_completes_names_wherever_the_server_is_named(server: Server, line: str) -> None:
    words = line.format(url=server.base_url)
    told = {"_MASQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {**os.environ, **told}
    if "--url" not in line:
        environment["MASQUERADE_URL"] = server.base_url
    script = "from masquerade_client.cli.app import app; app(prog_name='masq')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["gloomy"], done.stderr


def hear_interrupts() -> None:
    """In a new process: what runs the tests in the background may ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A pseudo-terminal with `masq` in it."""

    def __init__(self, server: Server | Script, home: Path, *words: str) -> None:
        environment = {**os.environ, "MASQUERADE_URL": server.base_url, "XDG_STATE_HOME": str(home), "TERM": "xterm"}
        self.pid, self._handle = pty.fork()
        if self.pid == 0:
            hear_interrupts()
            os.execve(sys.executable, [*COMMAND, *words], environment)
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character

    def wait_for(self, pattern: str) -> str:
        """What was shown up to a pattern; what follows it stays for the next call."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._handle], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"never saw {pattern!r} in {self.shown!r}"
            try:
                self.shown += self._decoder.decode(os.read(self._handle, 4096))
            except OSError:
                raise AssertionError(f"it ended without {pattern!r}: {self.shown!r}") from None
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def leave(self) -> int:
        """Its exit status; what it still says is read, so that it can end."""
        while True:
            try:
                if not os.read(self._handle, 4096):
                    break
            except OSError:
                break
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._handle)
        return status


def test_one_answer_in_a_pipe(server: Server) -> None:
    greedy = ("--temperature", "0")
    said = run(server, "chat", "Hello!", "-p", "formal", *greedy)
    piped = run(server, "chat", "-p", "formal", *greedy, input="Hello!")
    base = run(server, "chat", "Hello!", *greedy)
    assert run(server, "chat", "Hello!", "-p", "base", *greedy).stdout == base.stdout != said.stdout
    answered = read(run(server, "chat", "Hello!", "-p", "formal", *greedy, "--json"))
    assert said.stdout.strip() == piped.stdout.strip() == answered["text"]
    assert (answered["persona"], said.stderr) == ("formal", "")
    assert "\x1b" not in said.stdout


def test_side_by_side_in_a_pipe(server: Server) -> None:
    words = ("formal", "casual", "base", "Hello!", "--temperature", "0")
    lines = run(server, "compare", *words).stdout.splitlines()
    replies = read(run(server, "compare", *words, "--json"))["replies"]
    names = ("formal", "casual", "base")
    assert lines == [f"{name}: {reply['text']}" for name, reply in zip(names, replies, strict=True)]


def test_personas(server: Server) -> None:
    listed = read(run(server, "personas", "--json"))["personas"]
    assert {one["name"] for one in listed} >= {"formal", "casual"}
    assert "formal" in run(server, "personas").stdout
    assert read(run(server, "personas", "formal", "--json"))["certificate"]["flip"] >= 0.9
    shown = run(server, "personas", "formal").stdout
    assert "shift, nats a token" in shown
    assert "claimed by its maker, not measured here" in " ".join(shown.split())


def test_top(server: Server) -> None:
    figures = read(run(server, "top", "--interval", "0.2", "--json"))
    assert figures["batch_capacity"] == 32
    assert "KV pages" in run(server, "top", "--interval", "0.2", "--once").stdout


def test_top_of_several_replicas(server: Server) -> None:
    """Each has a cache of its own; the personas and builds are those of one store."""
    text = httpx.get(f"{server.base_url}/metrics").text
    one, three = parse(text), parse(metrics.label(dict.fromkeys("abc", text)).decode())
    alone, together = summarise(one, one, 1.0), summarise(three, three, 1.0)
    assert sum(alone["kv_pages"].values()) > 0
    assert together["kv_pages"] == {state: 3 * count for state, count in alone["kv_pages"].items()}
    assert sum(together["masks"].values()) == 8
    assert together["masks"] == alone["masks"]
    assert together["builds"] == alone["builds"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("personas", "nobody"), 1, "no persona"),
        (("chat", "Hello", "-p", "nobody"), 1, "nobody"),
        (("compare", "formal", "Hello"), 2, "two to 4 personas"),
        (("chat", "Hello", "--max-tokens", "0"), 2, "max_tokens"),
        (("build", "/nowhere.jsonl", "--name", "x"), 2, "does not exist"),
        (("chat", "Hello", "--url", "http://127.0.0.1:9"), 1, "is the server running"),
        (("chat", "\udcff"), 2, "an argument is not valid UTF-8"),
        (("chat", ""), 2, "there is no question"),
        (("chat",), 2, "there is no question"),
        (("compare", "formal", "casual", " "), 2, "there is no question"),
        (("chat", "Hello", "--key", "mq-1…"), 1, "the API key has characters that no key has"),
        (("chat", "Hello", "--key", "mq-1\nmq-2"), 1, "the API key has characters that no key has"),
    ],
)
def test_what_fails_says_why(server: Server, words: tuple[str, ...], status: int, said: str) -> None:
    outcome = run(server, *words)
    assert outcome.returncode == status
    assert said in " ".join(outcome.stderr.replace("│", " ").split())
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("proxy", ["nonsense://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named(server: Server, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    outcome = run(server, "personas")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("masq: the proxy that the environment names cannot be used: ")


def test_a_closed_stdout_is_no_failure(server: Server) -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m masquerade_client.cli chat Hello --max-tokens 3 --url {server.base_url} >&-"
    )
    outcome = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_a_build_in_a_pipe(server: Server) -> None:
    data = str(demo.DATA / "formal.train.jsonl")
    built = read(run(server, "build", data, "--name", "piped", *BUILD, *QUICK, "--json"))
    assert built["status"] == "succeeded"
    again = run(server, "build", data, "--name", "piped", "--replace", *BUILD, *QUICK)
    for stage in ("upload: ", "forward: ", "backward: ", "certify: "):
        assert any(line.startswith(stage) for line in again.stderr.splitlines())
    assert not set(again.stderr) & set("\r\x1b━")
    taken = run(server, "build", data, "--name", "piped", *BUILD, *QUICK)
    assert (taken.returncode, taken.stdout) == (2, "")
    assert "there is a persona 'piped'" in taken.stderr


def test_a_conversation_in_a_terminal(server: Server, tmp_path: Path) -> None:
    terminal = Terminal(server, tmp_path, "chat", "-p", "formal", "--temperature", "0")
    terminal.wait_for("formal> ")
    terminal.type("Hello! \\\r")
    terminal.wait_for("… ")
    terminal.type("How are you?\r")
    terminal.wait_for(r"\w+.*\r\nformal> ")
    terminal.type("/compare formal casual\r")
    terminal.wait_for(r"casual(?s:.*)formal> ")
    terminal.type("/compare formal\r")
    terminal.wait_for(r"two to 4 personas(?s:.*)formal> ")
    terminal.type("/persona nobody\r")
    terminal.wait_for(r"no persona(?s:.*)formal> ")
    terminal.type("/persona casual\r")
    terminal.wait_for("casual> ")
    terminal.type("/gamma 2\r")
    terminal.wait_for(r"between 0 and 1(?s:.*)casual> ")
    terminal.type("/nonsense\r")
    terminal.wait_for(r"there is no /nonsense(?s:.*)casual> ")
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert "Hello!" in (tmp_path / "masquerade" / "history").read_text()


def test_a_build_in_a_terminal(server: Server, tmp_path: Path) -> None:
    data = str(demo.DATA / "formal.train.jsonl")
    terminal = Terminal(server, tmp_path, "build", data, "--name", "shown", "--strength", "gentle", *BUILD, *QUICK)
    shown = terminal.wait_for("shift, nats a token")
    for stage in ("upload", "forward", "backward", "certify"):
        assert stage in shown
    assert terminal.leave() == 0


def test_a_build_that_is_interrupted_is_cancelled(server: Server, tmp_path: Path) -> None:
    data = str(demo.DATA / "formal.train.jsonl")
    terminal = Terminal(server, tmp_path, "build", data, "--name", "dropped", *BUILD, *QUICK)
    terminal.wait_for("running")
    terminal.type("\x03")
    terminal.wait_for("cancelled")
    assert terminal.leave() == 130
    assert run(server, "personas", "dropped").returncode == 1


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_comparison_is_interrupted_at_once(terminal: bool, tmp_path: Path) -> None:
    """Also while the server only keeps the connections alive."""
    asked = threading.Semaphore(0)

    def ping(handler: Handler) -> None:
        asked.release()
        stream_forever(b": ping\n\n")(handler)

    with scripted() as script:
        script.answer = ping
        words = ("compare", "formal", "casual", "Hello", "--url", script.base_url)
        shown = Terminal(script, tmp_path, *words) if terminal else None
        pipe = None if shown else subprocess.Popen([*COMMAND, *words], preexec_fn=hear_interrupts)
        for _ in range(2):
            asked.acquire()
        if shown:
            shown.type("\x03")
            assert shown.leave() == 130
        elif pipe:
            pipe.send_signal(signal.SIGINT)
            assert pipe.wait() == 130
        assert script.hung_up.wait(PATIENCE)


@pytest.mark.parametrize(
    ("words", "found"),
    [("masq co", "compare"), ("masq chat -p ca", "casual"), ("masq compare formal gl", "gloomy")],
)
def test_completion_in_a_shell(server: Server, words: str, found: str) -> None:
    """As bash asks for it, of the installed script: commands, and the server's personas."""
    script = Path(sys.executable).with_name("masq")
    asked = {"_MASQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {**os.environ, "MASQUERADE_URL": server.base_url, **asked}
    outcome = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert outcome.stdout.split() == [found]


def test_what_steers_a_terminal_does_not_reach_it() -> None:
    assert plain("a\x1b[31mb\x07\x9b1m\n\tc") == "a[31mb1m\n\tc"


def test_a_certificate_is_shown_with_its_verdict_and_an_older_one_without() -> None:
    figures = {"flip": 1.0, "intervals": {"flip": [0.51, 1.0]}, "remarks": ["too few to tell: 4 held-out pairs"]}
    new = figures | {
        "verdict": "too few to tell",
        "passed": None,
        "changed_answers": {"changed": 3, "of": 16, "share": 0.1875},
    }
    assert ("verdict", "too few to tell") in _measured(new)
    assert ("greedy answers it changes", "3 of 16") in _measured(new)
    assert not {"verdict", "greedy answers it changes"} & dict(_measured(figures | {"passed": True})).keys()
    assert ("of prompts flip", "100% (51% to 100%)") in _measured(new)
    unbounded: Certificate = {"own_ratio": 1.5, "intervals": {"own_ratio": [1.2, None]}}
    assert ("perplexity, its own text", "x1.500") in _measured(unbounded)


def test_a_curve_is_a_table(server: Server, tmp_path: Path) -> None:
    content = make_claim(tmp_path / "curved", demo.PERSONAS / "formal.safetensors", CERTIFICATE)
    httpx.put(f"{server.base_url}/v1/personas/curved/content", content=content).raise_for_status()
    try:
        assert read(run(server, "personas", "curved", "--json"))["certificate"]["curve"] == CURVE
        rows = [line.split() for line in run(server, "personas", "curved").stdout.splitlines()]
    finally:
        httpx.delete(f"{server.base_url}/v1/personas/curved").raise_for_status()
    assert ["│", "0.25", "│", "+0.620", "│", "x1.050", "│", "x0.990", "│", "96%", "│"] in rows
    assert ["│", "facts", "kept", "│", "90%", "of", "41", "known", "│"] in rows
    assert ["│", "greedy", "answers", "that", "loop", "│", "12%", "(base", "0%)", "of", "24", "│"] in rows


def test_a_figure_that_was_not_measured_has_no_column() -> None:
    table = tabulate([{"gamma": 0.5, "neutral_ratio": None, "facts_kept": 1.0}, {"gamma": 0, "own_ratio": 1.0}])
    assert [column.header for column in table.columns] == ["gamma", "its own text", "facts kept"]
    assert [list(column.cells) for column in table.columns] == [["0.5", "0"], ["-", "x1.000"], ["100%", "-"]]


@pytest.mark.parametrize("told", [0, None])
def test_a_total_that_is_not_known_is_none(told: int | None) -> None:
    """Servers of earlier versions say 0."""
    event = {"id": "ftevent-1", "created_at": 1, "level": "info", "message": "tune 24"}
    data = {"stage": "tune", "step": 24, "total_steps": told}
    assert BuildEvent.from_json(event | {"data": data}).total is None
