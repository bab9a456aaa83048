"""What nobody sane would send: masks, JSONL, chats, bytes. Each is refused in OpenAI's form, and nobody else notices.

The input is the corpus of hostile masks (`tests/attacks`) and mutations drawn from a seed. Any answer is right except
an unexpected failure, a hung connection or a stack trace.
"""

from __future__ import annotations

import copy
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from maskstore import MaskError, read_mask
from tests.attacks.corpus import attacks
from tests.contract.asking import CHAT
from tests.maskstore import forge
from tests.reliability.chaos import upload, write_examples
from tests.reliability.crowd import Crowd, Heard, Known, code_of, draw
from tests.reliability.faults import connect, job_for, quantile, resident
from tests.reliability.report import Progress, Row, Scale
from tests.reliability.scene import NAME, Scene, ailments, make_scene, mask_file
from tests.serving import Server

MASKS, LINES, CHATS, RAW, EXAMPLES = 2000, 400, 4000, 600, 10  # cases of a full run; the last is schemathesis', a route
LEAST_SHARE = 0.5  # of a full run, from which on schemathesis, which takes minutes at least, is a part of it
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 2**4000, 1e308, float("nan"), float("inf"), "", "\x00", "\ud800", "x" * 70_000, "漢" * 99,
    [], {}, [[]], [None], {"": None}, [[[[[[[[]]]]]]]], "../../etc/passwd", "' or 1=1 --", "demo:grim@00000000", "base",
)  # fmt: skip
FLOODS, FLOOD_SECONDS, SLOWER, GROWN_MIB = 48, 4.0, 2.0, 400  # rounds, and what they may cost others
MANY = {f"name {number}": number for number in range(300_000)}
JSON = {"Content-Type": "application/json"}
PATHS = re.compile(r"/(tmp|work|root|home|usr)/")


def play(scale: Scale, progress: Progress) -> Iterator[Row]:
    """One kind after the other, on one server, beside a crowd."""
    rng = random.Random(scale.seed)
    with make_scene() as scene:
        store = scene.new_store("store")
        with scene.serve(store) as server, connect(server) as http:
            known = Known.learn(http, [draw(rng) for _ in range(20)])
            with Crowd(server.base_url, known, 2, scale.seed).chatting() as heard:
                for number, attack in enumerate((send_masks, send_lines, send_chats, send_bytes), 1):
                    yield attack(scene, store, server, http, scale, rng)
                    progress(number, 6, "kinds of input")
            again = Known.learn(http, [body for body, _ in known.asked])
            wrong = [
                *heard.wrong,
                *(f"{body}" for (body, one), (_, two) in zip(known.asked, again.asked, strict=True) if one != two),
            ]
            faults = [*wrong[:3], *(f"refused: {code}" for code in heard.refused), *ailments(store)]
            faults += ["stack traces in its log"] if "Traceback" in server.said() else []
            yield send_floods(server, known, scale)
            yield Row(
                "nobody else notices anything",
                "chats of known requests all the while; then the store and the log",
                f"{heard.exact} answers",
                f"{len(wrong)} different, {heard.lost} cut off" + "".join(f"; {one}" for one in faults[:3]),
                kept=not faults and not heard.lost and heard.exact > 0,
            )
    yield run_schemathesis(scale)


def send_masks(scene: Scene, store: Path, server: Server, http: httpx.Client, scale: Scale, rng: random.Random) -> Row:
    """The corpus, read and sent; then mutations of a sound mask, sealed again so that they get further."""
    told, faults = Counter[str](), []
    corpus = list(attacks())
    for attack in corpus:
        folder = scene.folder / "attacks"
        folder.mkdir(exist_ok=True)
        path = attack.write(folder)
        try:
            read_mask(path)
            faults.append(f"{attack.name} was read")
        except MaskError as error:
            if type(error) is not attack.error:
                faults.append(f"{attack.name}: {type(error).__name__}")
        if attack.content:
            faults += look(
                f"{attack.name}",
                http.put("/v1/personas/attack/content", content=attack.content),
                told,
                {"invalid_mask"},
            )
    raw = mask_file(store, scene.masks["grim"].digest).read_bytes()
    count = scale.of(MASKS, 100)
    for case in range(count):
        content = mutate_mask(raw, rng)
        answer = http.put(f"/v1/personas/mutant-{case % 50}/content", content=content)
        faults += look(f"mutant {case}", answer, told, {"invalid_mask"}, may_succeed=True)
    return row(
        "a hostile mask is refused and never applied",
        f"{len(corpus)} attacks of the corpus, read and imported; mutations of a sound mask, most sealed again",
        len(corpus) + count,
        told,
        faults,
    )


def mutate_mask(raw: bytes, rng: random.Random) -> bytes:
    """Bits and bytes, or values of the header with every checksum made to fit."""
    if rng.random() < 0.4:
        content = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])

    def change(document: Any) -> None:
        key = rng.choice(sorted(document))
        if key == "__metadata__":
            document[key][rng.choice(sorted(document[key]))] = rng.choice(
                ["", "{}", "[]", "1e999", "NaN", "x" * 999, '"' * 9]
            )
        else:
            field = rng.choice(["dtype", "shape", "data_offsets"])
            document[key][field] = rng.choice([[0], [1, 2], [2**40, 2**41], "F64", None, [-1, 5]])

    return forge.edit(raw, change)


def send_lines(scene: Scene, store: Path, server: Server, http: httpx.Client, scale: Scale, rng: random.Random) -> Row:
    """Files of training examples that are none, or nearly."""
    told, faults = Counter[str](), []
    material = [upload(http, write_examples(side)) for side in ("training", "contrast")]
    count = scale.of(LINES, 30)
    lines = write_examples("training").splitlines()
    for case in range(count):
        content = mutate_lines(lines, rng)
        sent = http.post("/v1/files", files={"file": (f"{case}.jsonl", content)}, data={"purpose": "fine-tune"})
        faults += look(f"file {case}", sent, told, {"invalid_value"}, may_succeed=True)
        if sent.status_code == 200:
            file = sent.json()["id"]
            asked = http.post("/v1/fine_tuning/jobs", json=job_for(f"hostile-{case}", [file, material[1]]))
            faults += look(f"job {case}", asked, told, {"bad_dataset", "quota_exceeded"}, may_succeed=True)
            if asked.status_code == 200:
                http.post(f"/v1/fine_tuning/jobs/{asked.json()['id']}/cancel")
            http.delete(f"/v1/files/{file}")
    return row(
        "hostile training data is refused with its line, or built from",
        "mutated JSONL, uploaded and queued",
        count,
        told,
        faults,
    )


def mutate_lines(lines: list[bytes], rng: random.Random) -> bytes:
    """Some lines are broken, nested, huge, binary, or of another shape."""
    made = list(lines)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made))
        value = json.dumps(
            rng.choice([one for one in STRANGE if one == one and one not in (float("inf"), "\ud800")])
        ).encode()
        made[at] = rng.choice(
            [
                b"",
                rng.randbytes(rng.randint(1, 200)),
                made[at][: rng.randrange(len(made[at]) + 1)],
                b'{"text": ' + b"[" * rng.choice([5, 100_000]),
                b'{"text": ' + value + b"}",
                b'{"messages": ' + value + b"}",
                b'{"prompt": ' + value + b', "completion": ' + value + b"}",
                made[at].replace(b'"role"', b'"r\\u006fle"'),
                b"\xef\xbb\xbf" + made[at],
            ]
        )
    return rng.choice([b"\n", b"\n", b"\r\n", b"\x00"]).join(made) or b"\n"


def send_chats(scene: Scene, store: Path, server: Server, http: httpx.Client, scale: Scale, rng: random.Random) -> Row:
    """Sound requests with strange values in strange places."""
    told, faults = Counter[str](), []
    count = scale.of(CHATS, 200)
    for _ in range(count):
        body = draw(rng, longest=4) | rng.choice(
            [{}, {"n": 2}, {"stop": ["a"]}, {"tools": []}, {"logit_bias": {"7": 1}}]
        )
        for _ in range(rng.randint(1, 3)):
            body = mutate(body, rng)
        if isinstance(body, dict) and isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 64:
            body["max_tokens"] = 64
        text = json.dumps(body).encode()
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))] + rng.randbytes(rng.randrange(9))
        path = rng.choice(
            [CHAT, CHAT, CHAT, "/v1/completions", "/tokenize", "/v1/personas/compose", "/v1/fine_tuning/jobs"]
        )
        answer = http.post(path, content=text, headers={"Content-Type": "application/json"})
        faults += look(f"{path} {text[:300]!r}", answer, told, None, may_succeed=True)
    return row(
        "a hostile chat is answered or refused",
        "sound requests with strange values in strange places, to 5 routes",
        count,
        told,
        faults,
    )


def mutate(value: Any, rng: random.Random) -> Any:
    """The same document with one strange value somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        changed = copy.copy(value)
        key = rng.choice(sorted(changed))
        changed[key] = mutate(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + 1 :]]
    return rng.choice(STRANGE)


def send_floods(server: Server, known: Known, scale: Scale) -> Row:
    """Bodies at the limit, six at once, beside a crowd; in turn with rounds in which the crowd is alone."""
    rounds, told, faults = scale.of(FLOODS, 3), Counter[str](), []
    quiet, beside = Heard(), Heard()
    floods = dict(make_floods())
    before = most = resident(server)
    for number in range(2 * rounds):
        crowd = Crowd(server.base_url, known, 2, scale.seed + number)
        heard = beside if number % 2 else quiet
        with crowd.chatting() as said, ThreadPoolExecutor(6) as pool, connect(server) as http:
            until = time.monotonic() + FLOOD_SECONDS
            if number % 2:
                name = list(floods)[number // 2 % len(floods)]
                path, content = floods[name]
                asked = [pool.submit(http.post, path, content=content, headers=JSON) for _ in range(6)]
                while not all(one.done() for one in asked):
                    most = max(most, resident(server))
                    time.sleep(0.01)
                for one in asked:
                    faults += look(name, one.result(), told, {"context_length_exceeded", "invalid_value"})
            time.sleep(max(0.0, until - time.monotonic()))
        heard.times += said.times
        heard.exact, heard.lost = heard.exact + said.exact, heard.lost + said.lost
        faults += [*said.wrong[:3], *(f"refused: {code}" for code in said.refused)]
    slower = quantile(beside) / quantile(quiet)
    grown = (most - before) >> 20
    faults += [f"p95 is {slower:.1f} times that of the quiet rounds"] if not slower <= SLOWER else []
    faults += [f"{grown} MiB more memory"] if grown > GROWN_MIB else []
    faults += [f"{beside.lost} answers cut off"] if beside.lost else []
    result = row("what is far too much is refused at no cost to others", "", 6 * rounds, told, faults)
    return replace(
        result,
        test=f"{', '.join(floods)}: 8 MB each, six at once, beside chats whose p95 must stay within {SLOWER:g} times",
        result=f"p95 {quantile(quiet):.0f} ms, then {quantile(beside):.0f} ms; {grown} MiB more memory; "
        f"{result.result}",
    )


def make_floods() -> Iterator[tuple[str, tuple[str, bytes]]]:
    """What is as large as a body may be, and says far too much, by what it is."""

    def chat(**fields: Any) -> tuple[str, bytes]:
        return CHAT, json.dumps({"model": NAME, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()

    def call(arguments: str) -> list[dict[str, Any]]:
        called = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "tool_calls": [called]}]

    text = "Are you out there? " * 416_000
    yield "a prompt", chat(messages=[{"role": "user", "content": text}])
    yield "a system prompt", chat(messages=[{"role": "system", "content": text}])
    yield "a tool", chat(tools=[{"type": "function", "function": {"name": "f", "description": text}}])
    yield "a text to go on with", ("/v1/completions", json.dumps({"model": NAME, "prompt": text}).encode())
    yield "a text to tokenise", ("/tokenize", json.dumps({"prompt": text}).encode())
    yield "empty arrays", chat(stop=[[]] * 1_900_000)
    yield "deep arguments", chat(messages=call("[" * 3_900_000 + "]" * 3_900_000))
    yield "a schema of many names", chat(tools=[{"type": "function", "function": {"name": "f", "parameters": MANY}}])


def send_bytes(scene: Scene, store: Path, server: Server, http: httpx.Client, scale: Scale, rng: random.Random) -> Row:
    """What is hardly HTTP. The connection must be answered or closed, not held, once our side has ended."""
    told, faults = Counter[str](), []
    count = scale.of(RAW, 40)
    host, _, port = server.base_url.removeprefix("http://").partition(":")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sound = head + b"Content-Length: 2\r\n\r\n{}"
    for case in range(count):
        content = bytearray(
            rng.choice([sound, rng.randbytes(rng.randint(1, 2000)), b"\x16\x03\x01\x02\x00" + rng.randbytes(500)])
        )
        for _ in range(rng.randint(0, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        with socket.create_connection((host, int(port)), timeout=45) as wire:
            try:
                wire.sendall(content)
                wire.shutdown(socket.SHUT_WR)
                heard = b""
                while more := wire.recv(65536):
                    heard += more
            except ConnectionError:
                heard = b""
            except TimeoutError:
                faults.append(f"bytes {case} are held: {bytes(content)[:200]!r}")
                continue
        status = heard.split(b" ")[1].decode("latin-1") if heard.count(b" ") > 1 else "closed"
        told[status] += 1
        if status.startswith("5"):
            faults.append(f"bytes {case}: {heard[:300]!r}")
    return row(
        "what is hardly HTTP is answered, or hung up on",
        "random bytes, and requests with random bytes in them",
        count,
        told,
        faults,
    )


def run_schemathesis(scale: Scale) -> Row:
    """Requests that are made from the OpenAPI description."""
    promise, test = "every route keeps to its description, whatever is sent", "schemathesis (`tests.fuzzing.run`)"
    if find_spec("tests.fuzzing") is None or find_spec("tests.fuzzing.run") is None:
        return Row(promise, test, "0", "`tests.fuzzing` is not there", kept=None)
    if scale.share < LEAST_SHARE:
        return Row(promise, test, "0", "takes minutes, and this run is short; `make fuzz` runs it", kept=None)
    command = [sys.executable, "-m", "tests.fuzzing.run", "--examples", str(scale.of(EXAMPLES, 3))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    counted = next(
        (found for line in said[::-1] if (found := re.search(r"(\d[\d,]*) (?:requests|cases|test cases)", line))), None
    )
    return Row(promise, test, counted[0] if counted else "?", said[-1][:300] if said else "", kept=done.returncode == 0)


def look(
    what: str, answer: httpx.Response, told: Counter[str], codes: set[str] | None, *, may_succeed: bool = False
) -> list[str]:
    """What is wrong with an answer, if anything is."""
    if answer.status_code < 300:
        told["done"] += 1
        return [] if may_succeed else [f"{what} was accepted"]
    code = code_of(answer)
    told[code] += 1
    fine = (
        answer.status_code < 500
        and code != "untyped"
        and (codes is None or code in codes)
        and not PATHS.search(answer.text)
    )
    return [] if fine else [f"{what}: {answer.status_code} {answer.text:.200}"]


def row(promise: str, test: str, count: int, told: Counter[str], faults: list[str]) -> Row:
    said = ", ".join(f"{number} {code}" for code, number in told.most_common())
    return Row(promise, test, f"{count} cases", said + "".join(f"; {one}" for one in faults[:3]), kept=not faults)
