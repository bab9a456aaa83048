"""What goes wrong around a server, one thing after the other, while others chat: they notice nothing, clients that are
hit get an error in OpenAI's form, and when the fault is over all is as before, without anybody's help.

The faults are real: full file systems, a disk that refuses or dawdles (`disk.c`), limits of memory,
locked tables, a wall clock that jumps.
"""

from __future__ import annotations

import os
import random
import resource
import socket
import sqlite3
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import world
from tests.reliability.chaos import upload, write_examples
from tests.reliability.crowd import CHAT, Crowd, Heard, Known, ask, code_of, draw
from tests.reliability.report import Progress, Row, Scale
from tests.reliability.scene import NAME, PERSONAS, Scene, ailments, make_scene, mask_file
from tests.serving import Server
from tests.zygote import Zygote

UNFORESEEN = ("untyped", "internal_error")
BALLAST = 2**16  # bytes of a piece
WIDE = 16_384  # columns of an MLP whose activations fill a memory
PATIENCE = 38.0  # seconds after which nobody is waited for: 30 for a head or a piece of a body, 5 to take leave


@dataclass
class Trial:
    """What happened in the presence of a fault."""

    heard: list[Heard] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # codes that were told to those whom it hit
    faults: list[str] = field(default_factory=list)
    said: str = ""

    def hold(self, fine: bool, what: str) -> None:
        """Note a broken promise."""
        if not fine:
            self.faults.append(what)

    def refused(self, what: str, response: httpx.Response, codes: Sequence[str] = ()) -> None:
        """It must have been refused, in OpenAI's form, for a reason that was foreseen."""
        code = code_of(response) if response.status_code >= 400 else "done"
        self.answers[code] += 1
        fine = code not in (*UNFORESEEN, "done") and (not codes or code in codes)
        self.hold(fine, f"{what}: {response.status_code} {response.text:.200}")

    def done(self, what: str, response: httpx.Response) -> None:
        """It must have been done."""
        self.hold(response.status_code < 300, f"{what} afterwards: {response.status_code} {response.text:.200}")


@dataclass(frozen=True)
class Stage:
    """A scene, what its model says, and how long a fault lasts."""

    scene: Scene
    known: Known
    scale: Scale

    @property
    def seconds(self) -> float:
        """How long others chat beside a fault."""
        return self.scale.of(8, 2)

    def crowd(self, server: Server, known: Known | None = None, clients: int = 3) -> Crowd:
        return Crowd(server.base_url, known or self.known, clients, self.scale.seed)

    def check(self, trial: Trial, server: Server, store: Path) -> None:
        """All is well: a chat of every kind is exact, the store is whole, the log has no stack trace."""
        with connect(server) as http:
            for body, expected in self.known.asked:
                trial.hold((reply := ask(http, body)) == expected, f"afterwards {body}: {reply}, not {expected}")
            trial.hold(http.get("/readyz").status_code == 200, "it is not ready afterwards")
        trial.faults += ailments(store)


@contextmanager
def faulty_disk(stage: Stage, name: str) -> Iterator[tuple[Server, Path, Path]]:
    """A server whose store lies on a disk with faults; the word in the file (the last of the three) chooses which."""
    folder = stage.scene.folder / name
    folder.mkdir()
    library, word = compile_shim(stage.scene.folder, "disk"), folder / "word"
    store = stage.scene.new_store(f"{name}/store")
    env = {"LD_PRELOAD": str(library), "MODE_FILE": str(word), "FAULTY_FOLDER": str(store)}
    with closing(Zygote(env)) as zygote, stage.scene.serve(store, zygote=zygote) as server:
        yield server, store, word


def fill_the_disk(stage: Stage) -> Trial:
    trial, disk = Trial(), stage.scene.folder / "full"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "full", disk], capture_output=True, check=False
    ).returncode:
        raise NotHere("file systems cannot be mounted here; run it as root or below `unshare --mount --map-root-user`")
    try:
        store = stage.scene.new_store("full/store")
        with stage.scene.serve(store) as server, connect(server) as http:
            material = [upload(http, write_examples(side)) for side in ("training", "contrast")]
            with stage.crowd(server).chatting() as heard:
                job = order(http, "before", material)
                ballast = fill(disk)
                for turn in range(stage.scale.of(12, 3)):
                    for what, response in write_everything(http, store, turn, material):
                        trial.refused(what, response)
                ballast.unlink()
                for what, response in write_everything(http, store, 99, material):
                    trial.done(what, response)
                trial.hold(await_end(http, job["id"]) in ("succeeded", "failed"), "the job does not end")
                trial.hold(await_end(http, order(http, "after", material)["id"]) == "succeeded", "no build afterwards")
            trial.heard.append(heard)
            stage.check(trial, server, store)
            kept = set(store.glob("builds/job-*"))  # of a job that had no room, for a day
            trial.hold(len(kept) <= 1, f"{len(kept)} builds are kept")
            trial.faults += leftovers_of(store, but=kept)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    return trial


def refuse_writes(stage: Stage) -> Trial:
    trial = Trial()
    with faulty_disk(stage, "readonly") as (server, store, word), connect(server) as http:
        material = [upload(http, write_examples(side)) for side in ("training", "contrast")]
        with stage.crowd(server).chatting() as heard:
            for mode in ("readonly", "broken"):
                word.write_text(mode)
                for turn in range(stage.scale.of(10, 2)):
                    for what, response in write_everything(http, store, turn, material):
                        trial.refused(f"{what}, {mode}", response)
                trial.hold(http.get("/v1/personas").status_code == 200, f"reading what is {mode}")
                word.unlink()
            for what, response in write_everything(http, store, 99, material):
                trial.done(what, response)
        trial.heard.append(heard)
        stage.check(trial, server, store)
    return trial


def slow_the_disk(stage: Stage) -> Trial:
    trial = Trial()
    with faulty_disk(stage, "slow") as (server, store, word), connect(server) as http:
        material = [upload(http, write_examples(side)) for side in ("training", "contrast")]
        with stage.crowd(server).chatting() as before:
            time.sleep(stage.seconds)
        word.write_text("slow")
        with stage.crowd(server).chatting() as heard:
            job = order(http, "slowly", material)
            for what, response in write_everything(http, store, 1, material):
                trial.done(what, response)
            time.sleep(stage.seconds)
            word.unlink()
            trial.hold(await_end(http, job["id"]) == "succeeded", "the build on a slow disk")
        trial.heard += [before, heard]
        trial.said = (
            f"p95 of chats {quantile(before):.0f} ms before, {quantile(heard):.0f} ms beside writes and a build on it"
        )
        stage.check(trial, server, store)
    return trial


def corrupt_a_mask(stage: Stage) -> Trial:
    trial, store = Trial(), stage.scene.new_store("corrupt")
    cold, warm = "salty", "lofty"
    path = {name: mask_file(store, stage.scene.masks[name].digest) for name in (cold, warm)}
    sound = {name: one.read_bytes() for name, one in path.items()}
    others = Known([(body, reply) for body, reply in stage.known.asked if body.get("persona") != cold])
    with stage.scene.serve(store) as server, connect(server) as http:
        for body, _ in others.asked:
            ask(http, body)  # the personas are there
        with stage.crowd(server, others).chatting() as heard:
            for turn in range(stage.scale.of(40, 8)):
                damaged = flip(sound[cold], random.Random(turn))
                path[cold].write_bytes(damaged)
                response = http.post(CHAT, json=chat(persona=cold))
                trial.refused("a chat with a damaged mask", response, ["persona_damaged"])
                replace(path[warm], flip(sound[warm], random.Random(turn)))  # another file; the old one stays applied
            for name in path:
                replace(path[name], sound[name])
        trial.heard.append(heard)
        stage.check(trial, server, store)
    return trial


def jump_the_clock(stage: Stage) -> Trial:
    trial, store = Trial(), stage.scene.new_store("clock")
    now = stage.scene.folder / "clock.offset"
    now.write_bytes(bytes(8))
    env = {"LD_PRELOAD": str(compile_shim(stage.scene.folder, "clock")), "CLOCK_FILE": str(now)}
    with (
        closing(Zygote(env)) as zygote,
        stage.scene.serve(store, zygote=zygote) as server,
        connect(server) as http,
    ):
        material = [upload(http, write_examples(side)) for side in ("training", "contrast")]
        with stage.crowd(server, clients=1).chatting() as heard:
            seen = []
            for turn, jump in enumerate((1, -3, 25, -9000, 0)):  # days
                set_clock(now, jump * 86_400)
                for what, response in write_everything(http, store, turn, material):
                    trial.done(f"{what} at {jump:+} days", response)
                job = response.json()  # the last one
                seen.append(job["created_at"])
                trial.hold(await_end(http, job["id"]) == "succeeded", f"a build at {jump:+} days")
        trial.hold(max(seen) - min(seen) > 9000 * 86_000, f"the clock did not jump: {seen}")
        trial.heard.append(heard)
        stage.check(trial, server, store)
    return trial


def starve_a_step(stage: Stage) -> Trial:
    trial = Trial()
    with wide_server(stage, "step") as (server, _, known), connect(server) as http:
        for turn in range(stage.scale.of(6, 2)):
            large = chat(messages=[{"role": "user", "content": f"{turn} " + "why " * 450}])  # no prefix is known
            with starving(server, 2**25):
                response = http.post(CHAT, json=large)
                if (
                    not turn or response.status_code != 200
                ):  # the first large step leaves the memory that the next needs
                    trial.refused("a step that has no memory", response, ["step_failed"])
                with stage.crowd(server, known, 2).chatting() as heard:
                    time.sleep(stage.seconds / 4)
                trial.heard.append(heard)
            with stage.crowd(server, known, 2).chatting() as heard:
                trial.done("the same step", http.post(CHAT, json=large))
            trial.heard.append(heard)
    return trial


def starve_a_build(stage: Stage) -> Trial:
    trial = Trial()
    with wide_server(stage, "build", num_hidden_layers=1) as (server, store, known), connect(server) as http:
        material = [upload(http, write_examples(side, 48)) for side in ("training", "contrast")]
        with stage.crowd(server, known, 2).chatting() as heard:
            for turn in range(stage.scale.of(3)):
                with starving(server, 2**26):
                    job = order(http, f"starved-{turn}", material)
                    ended = await_end(http, job["id"])
                    error = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["error"] or {}
                    trial.answers[str(error.get("code"))] += 1
                    trial.hold(ended == "failed" and bool(error.get("message")), f"a starved build: {ended} {error}")
                ended = await_end(http, order(http, f"fed-{turn}", material)["id"])
                trial.hold(ended == "succeeded", f"the build afterwards: {ended}")
        trial.heard.append(heard)
        trial.faults += ailments(store) + leftovers_of(store)
    return trial


def lock_the_tables(stage: Stage) -> Trial:
    trial, store = Trial(), stage.scene.new_store("locked")
    bare = Known([(body, reply) for body, reply in stage.known.asked if "persona" not in body])
    worn = Known([(body, reply) for body, reply in stage.known.asked if "persona" in body])
    with stage.scene.serve(store) as server, connect(server) as http:
        material = [upload(http, write_examples(side)) for side in ("training", "contrast")]
        long = stage.scale.of(33, 2)
        for table, known in (
            ("jobs/jobs.sqlite", stage.known),
            ("keys.sqlite", stage.known),
            ("registry.sqlite", bare),
        ):
            with stage.crowd(server, known).chatting() as heard, lock(store / table):
                started = time.monotonic()
                if known is bare and long > 30:  # beyond sqlite's patience
                    trial.refused(
                        "a persona while the registry is locked",
                        http.post(CHAT, json=chat(persona="grim")),
                        ["not_ready"],
                    )
                if "jobs" in table and long > 30:
                    form = {"files": {"file": ("b.jsonl", b"{}")}, "data": {"purpose": "fine-tune"}}
                    trial.refused("an upload while the jobs are locked", http.post("/v1/files", **form), ["not_ready"])
                time.sleep(max(0.0, min(long, stage.seconds) - (time.monotonic() - started)))
            trial.heard.append(heard)
        with stage.crowd(server, worn).chatting() as heard:  # who waits for less than that is served, only later
            for _ in range(3):
                with lock(store / "registry.sqlite"):
                    time.sleep(0.5)
                time.sleep(0.2)
        trial.heard.append(heard)
        for what, response in write_everything(http, store, 1, material):
            trial.done(what, response)
        stage.check(trial, server, store)
    return trial


def besiege(stage: Stage) -> Trial:
    """Connections that send half a request and fall silent, that send a byte a second, that send 10 MB of headers, that
    never read what they asked for; all at once.
    """
    trial, store = Trial(), stage.scene.new_store("siege")
    half, slow, deaf, fat = (stage.scale.of(count, 20) for count in (300, 200, 50, 20))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    with stage.scene.serve(store) as server, connect(server) as http, ExitStack() as stack:
        for body, _ in stage.known.asked:
            ask(http, body)
        before = count_files(server)
        with stage.crowd(server).chatting() as heard:
            started = time.monotonic()
            halves = [reach(server, stack, head) for _ in range(half)]
            silent = [
                reach(server, stack, head + b"Content-Length: 100\r\nContent-Type: application/json\r\n\r\n{")
                for _ in range(20)
            ]
            loris = [reach(server, stack, head + b"X-Slow: ") for _ in range(slow)]
            long = httpx.Request("POST", server.base_url, json=chat(stream=True, max_tokens=400, logprobs=True)).read()
            request = head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(long), long)
            stalled = [reach(server, stack, request, 4096) for _ in range(deaf)]
            memory = resident(server)
            for _ in range(fat):
                trial.hold(send_headers(server) in (b"400", b"431", b""), "10 MB of headers")
            trial.hold(resident(server) - memory < 2**26, f"10 MB headers took {(resident(server) - memory) >> 20} MB")
            while time.monotonic() - started < PATIENCE:
                for one in loris:
                    trickle(one)
                time.sleep(1)
            for name, connections in (("half a head", halves), ("half a body", silent), ("a byte a second", loris)):
                held = sum(not is_closed(one) for one in connections)
                trial.hold(
                    not held,
                    f"{held} of {len(connections)} connections with {name} are held after {PATIENCE:.0f} s",
                )
            for one in stalled:
                one.close()
        trial.heard.append(heard)
        stack.close()
        deadline = time.monotonic() + 10
        while count_files(server) > before + 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        trial.hold(count_files(server) <= before + 8, f"{count_files(server)} open files, {before} before")
        trial.said = f"{half} half-open, {slow} slow, 20 silent, {deaf} deaf connections, {fat} times 10 MB of headers"
        stage.check(trial, server, store)
    return trial


class NotHere(Exception):
    """A fault that cannot be made on this machine."""


FAULTS: tuple[tuple[str, str, Callable[[Stage], Trial]], ...] = (
    (
        "connections that are half open, slow, silent, deaf or have 10 MB of headers hurt nobody and are hung up on",
        "raw sockets",
        besiege,
    ),
    (
        "a full disk is a 507 or 503, and over when there is room",
        "a tmpfs with ballast, and a build on it",
        fill_the_disk,
    ),
    (
        "a disk that turns read-only, or fails, refuses changes and serves on",
        "EROFS and EIO for every write (`disk.c`)",
        refuse_writes,
    ),
    ("a slow disk slows nobody who chats", "30 ms for every write and sync (`disk.c`)", slow_the_disk),
    (
        "a mask that is damaged on disk hurts those who ask for it, and is never applied",
        "flipped bits in files of a running server",
        corrupt_a_mask,
    ),
    (
        "a clock that jumps changes nothing",
        "the time of day by days forth and decades back (`clock.c`)",
        jump_the_clock,
    ),
    (
        "a step without memory ends the request that needs it, and no other",
        "RLIMIT_AS of the running server, a prompt of 1800 tokens",
        starve_a_step,
    ),
    ("a build without memory fails with a reason, and chats go on", "RLIMIT_AS of the running server", starve_a_build),
    (
        "tables that another process locks are waited for, or a 503",
        "`begin exclusive` on each sqlite file",
        lock_the_tables,
    ),
)


def play(scale: Scale, progress: Progress) -> Iterator[Row]:
    """One fault after the other."""
    rng = random.Random(scale.seed)
    bodies = [draw(rng, longest=24) for _ in range(20)]
    bodies += [draw(rng, personas=[persona]) | {"persona": persona} for persona in PERSONAS]
    bodies += [
        {key: value for key, value in draw(rng).items() if key not in ("persona", "gamma", "persona_phase")}
        for _ in range(3)
    ]
    with make_scene() as scene:
        with scene.serve(scene.new_store("quiet")) as server, connect(server) as http:
            stage = Stage(scene, Known.learn(http, bodies), scale)
        for number, (promise, test, make) in enumerate(FAULTS, 1):
            yield try_fault(stage, promise, test, make)
            progress(number, len(FAULTS), "faults")


def try_fault(stage: Stage, promise: str, test: str, make: Callable[[Stage], Trial]) -> Row:
    try:
        trial = make(stage)
    except NotHere as reason:
        return Row(promise, test, "0", str(reason), kept=None)
    except (AssertionError, httpx.HTTPError, OSError) as error:
        return Row(promise, test, "1", f"{type(error).__name__}: {error}"[:500], kept=False)
    exact = sum(heard.exact for heard in trial.heard)
    refused = sum((heard.refused for heard in trial.heard), Counter[str]())
    lost = sum(heard.lost for heard in trial.heard)
    wrong = [one for heard in trial.heard for one in heard.wrong]
    trial.hold(not refused, f"others were refused: {dict(refused)}")
    trial.hold(not lost, f"{lost} of the others' connections broke")
    trial.hold(exact > 0, "nobody chatted")
    codes = ", ".join(f"{count} {code}" for code, count in trial.answers.items())
    told = [
        f"others: {exact} exact, {len(wrong)} different",
        *([f"told: {codes}"] if codes else []),
        *([trial.said] if trial.said else []),
    ]
    broken = [*wrong[:2], *trial.faults[:4]]
    return Row(promise, test, f"{exact} chats", "; ".join([*told, *broken])[:1500], kept=not broken)


def write_everything(
    http: httpx.Client, store: Path, turn: int, material: Sequence[str]
) -> Iterator[tuple[str, httpx.Response]]:
    """Everything that changes the store."""
    content = os.urandom(2**17).hex().encode()
    yield "an upload", http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
    yield (
        "a composition",
        http.post(
            "/v1/personas/compose",
            json={
                "name": f"new-{turn}",
                "expression": random.Random(f"{turn}").choice(
                    ["grim | merry", "lofty - merry", "lofty & merry", "grim | lofty"]
                ),
            },
        ),
    )
    yield "a change", http.patch("/v1/personas/grim", json={"notes": f"{turn} " * 1500})
    mask = next(path for path in sorted((store / "masks").glob("*/*.safetensors"))).read_bytes()
    yield "an import", http.put(f"/v1/personas/brought-{turn}/content", content=mask)
    yield "a job", http.post("/v1/fine_tuning/jobs", json=job_for(f"built-{turn}", material))


def job_for(name: str, material: Sequence[str]) -> dict[str, Any]:
    mask = {"score": "attribution", "rho": 0.01, "force": True, "phase": "all", "contrast_file": material[1]}
    return {"model": NAME, "training_file": material[0], "suffix": name, "method": {"type": "mask", "mask": mask}}


def order(http: httpx.Client, name: str, material: Sequence[str]) -> dict[str, Any]:
    response = http.post("/v1/fine_tuning/jobs", json=job_for(name, material))
    assert response.status_code == 200, response.text
    job: dict[str, Any] = response.json()
    return job


def await_end(http: httpx.Client, job_id: str, seconds: float = 240) -> str:
    deadline = time.monotonic() + seconds
    while (status := str(http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"])) in ("queued", "running"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return status


def compile_shim(folder: Path, name: str) -> Path:
    """A library to preload, from the C file of this name."""
    library = folder / f"{name}.so"
    if not library.exists():
        source = Path(__file__).with_name(f"{name}.c")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotHere(f"`{name}.c` cannot be compiled: {error}") from error
    return library


def set_clock(path: Path, seconds: int) -> None:
    """Have the time of day differ by so much from now on. The file is mapped, so it is written in place."""
    with path.open("r+b") as file:
        file.write(struct.pack("=q", seconds))


def fill(disk: Path) -> Path:
    """A file that takes what room there is."""
    path = disk / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(BALLAST)):
                pass
        except OSError:
            while True:
                try:
                    file.write(bytes(512))
                except OSError:
                    return path


def leftovers_of(store: Path, but: Collection[Path] = ()) -> list[str]:
    """Temporary files of what failed."""
    rest = [
        *store.glob("jobs/files/*.partial"),
        *store.glob("builds/*"),
        *store.glob("quarantine/*"),
        *store.glob("masks/??/.*"),
    ]
    return [f"left over: {path.relative_to(store)}" for path in rest if path not in but]


@contextmanager
def wide_server(stage: Stage, name: str, **shape: int) -> Iterator[tuple[Server, Path, Known]]:
    """A server of a model whose activations are large, what it says to short questions, and no persona."""
    folder = stage.scene.folder / name
    model = world.make_model(folder / NAME, max_position_embeddings=2048, intermediate_size=WIDE, **shape)
    rng = random.Random(name)
    short = [
        {**chat(messages=[{"role": "user", "content": rng.choice("abcdef")}], max_tokens=12), "seed": seed}
        for seed in range(6)
    ]
    with stage.scene.serve(folder / "store", model=model) as server:
        with connect(server) as http:
            known = Known.learn(http, short)
        yield server, folder / "store", known


@contextmanager
def starving(server: Server, spare: int) -> Iterator[None]:
    """The server can map so many bytes more, and no others."""
    pid = server.process.pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(pid, resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, free)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Another process' exclusive transaction."""
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        db.execute("begin exclusive")
        yield
        db.execute("rollback")


def chat(**fields: Any) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": "why?"}],
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        **fields,
    }


def flip(content: bytes, rng: random.Random) -> bytes:
    """A bit of the second half of a file, where the tensors are, is another."""
    at = rng.randrange(len(content) // 2, len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def replace(path: Path, content: bytes) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(content)
    os.replace(other, path)


def quantile(heard: Heard, share: float = 0.95) -> float:
    """Of the milliseconds until a whole answer."""
    times = sorted(seconds for _, seconds in heard.times)
    return 1000 * times[int(share * (len(times) - 1))] if times else float("nan")


def reach(server: Server, stack: ExitStack, content: bytes, buffer: int | None = None) -> socket.socket:
    """A connection that has sent so much."""
    one = socket.socket()
    if buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    one.settimeout(10)
    host, _, port = server.base_url.removeprefix("http://").partition(":")
    one.connect((host, int(port)))
    stack.callback(one.close)
    one.sendall(content)
    return one


def trickle(one: socket.socket) -> None:
    with suppress(OSError):
        one.sendall(b"x")


def is_closed(one: socket.socket) -> bool:
    """Whether the server has hung up; what it said before is read."""
    one.settimeout(0)
    try:
        while one.recv(2**16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def send_headers(server: Server, size: int = 10 * 2**20) -> bytes:
    """The status that 10 MB of headers get; nothing if the connection was reset meanwhile."""
    with ExitStack() as stack:
        one = reach(server, stack, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        line = b"X-Much: " + b"x" * 8000 + b"\r\n"
        try:
            for _ in range(size // len(line)):
                one.sendall(line)
        except OSError:
            pass
        try:
            return one.recv(64).split(b" ")[1]
        except (OSError, IndexError):
            return b""


def resident(server: Server) -> int:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def count_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def connect(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.base_url, timeout=120)
