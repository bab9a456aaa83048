"""A server that is killed at random moments of everything it does: nothing that was acknowledged is ever lost.

Knows workers that upload, queue, change the registry, change keys and chat, each of which writes down what was
acknowledged, and what one thing it had asked for when the server died. Refuses to accept any state but the one before
that or the one after.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from masquerade.keys.table import KeyTable as Keys
from tests.keys.making import bearer, make_key
from tests.reliability.crowd import Crowd, Known, draw
from tests.reliability.report import Progress, Row, Scale
from tests.reliability.scene import NAME, Scene, ailments, make_scene, mask_file
from tests.serving import Server

KILLS = 200
LONGEST = 1.6  # seconds that a server lives at most, once it is ready
OPEN_JOBS = 3
STAGES = ("check", "encode", "neutral", "forward", "backward", "tune", "certify")
TERMINAL = ("succeeded", "failed", "cancelled")
Json = dict[str, Any]


class Lost(AssertionError):
    """Something that was acknowledged is not there, or something is there by half."""


@dataclass
class Ledger:
    """Everything that was acknowledged so far."""

    files: dict[str, str] = field(default_factory=dict)  # id -> sha256
    gone: set[str] = field(default_factory=set)  # files that were deleted
    jobs: dict[str, str] = field(default_factory=dict)  # id -> state that was seen last
    personas: dict[str, Json] = field(default_factory=dict)  # name -> what the registry said
    pins: set[str] = field(default_factory=set)  # digests
    keys: dict[str, str] = field(default_factory=dict)  # token -> "valid" or "revoked"
    asked: Counter[str] = field(default_factory=Counter)  # acknowledged, by kind
    struck: Counter[str] = field(default_factory=Counter)  # what was under way when a server was killed


class Worker:
    """Does one thing after the other until the server is gone. `pending` is what it had asked for and not heard of."""

    kind = ""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger, self.rng = ledger, random.Random(f"{self.kind} {seed}")
        self.pending: Any = None
        self.fault: BaseException | None = None

    def run(self, http: httpx.Client, over: threading.Event) -> None:
        try:
            while not over.is_set():
                self.turn(http)
        except httpx.HTTPError:
            return  # it was killed
        except BaseException as fault:
            self.fault = fault

    def turn(self, http: httpx.Client) -> None:
        raise NotImplementedError

    def verify(self, http: httpx.Client) -> None:
        """What was acknowledged is there, and what was pending is there whole or not at all. Raises `Lost`."""
        raise NotImplementedError

    def send(self, http: httpx.Client, method: str, path: str, pending: Any, **options: Any) -> Any:
        """Ask for something; the answer's JSON. What was asked for is pending until the answer is here."""
        self.pending = pending
        answer = http.request(method, path, **options)
        if answer.status_code >= 400:
            raise Lost(f"{method} {path}: {answer.status_code} {answer.text:.300}")
        self.ledger.asked[self.kind] += 1
        return answer.json()


class Uploader(Worker):
    """Sends and deletes files."""

    kind = "upload"
    most = 40

    def turn(self, http: httpx.Client) -> None:
        ledger = self.ledger
        if len(ledger.files) > self.most:
            one = self.rng.choice(sorted(ledger.files))
            self.send(http, "DELETE", f"/v1/files/{one}", ("delete", one))
            del ledger.files[one]
            ledger.gone.add(one)
        else:
            content = json.dumps({"text": self.rng.randbytes(self.rng.choice([50, 5_000, 400_000])).hex()}).encode()
            digest = hashlib.sha256(content).hexdigest()
            form = {"files": {"file": (f"{digest[:8]}.jsonl", content)}, "data": {"purpose": "fine-tune"}}
            told = self.send(http, "POST", "/v1/files", ("upload", digest), **form)
            ledger.files[told["id"]] = digest
        self.pending = None

    def verify(self, http: httpx.Client) -> None:
        there = {one["id"]: one for one in http.get("/v1/files").json()["data"] if one["purpose"] == "fine-tune"}
        match self.pending:
            case ("delete", one) if one not in there:
                self.ledger.files.pop(one)
                self.ledger.gone.add(one)
        self.pending = None
        if missing := self.ledger.files.keys() - there.keys():
            raise Lost(f"files {missing}")
        if back := self.ledger.gone & there.keys():
            raise Lost(f"deleted files are back: {back}")
        for one in self.rng.sample(sorted(self.ledger.files), min(3, len(self.ledger.files))):
            self.read(http, one)

    def read(self, http: httpx.Client, one: str) -> None:
        if hashlib.sha256(http.get(f"/v1/files/{one}/content").content).hexdigest() != self.ledger.files[one]:
            raise Lost(f"the content of the file {one}")


class Builder(Worker):
    """Queues and cancels jobs. A job bears a number, so that one that is queued twice is found."""

    kind = "queue"

    def __init__(self, ledger: Ledger, seed: int, material: dict[str, str]) -> None:
        super().__init__(ledger, seed)
        self.material = material  # ids of the files to build from
        self.numbers = itertools.count()
        self.unsure: list[Json] = []  # asked for, not heard of: asked again

    def turn(self, http: httpx.Client) -> None:
        jobs = list_jobs(http)
        self.note(jobs)
        unfinished = [job["id"] for job in jobs if job["status"] not in TERMINAL]
        if unfinished and self.rng.random() < 0.03:
            one = self.rng.choice(unfinished)
            answer = http.post(f"/v1/fine_tuning/jobs/{one}/cancel")
            if answer.status_code == 200:
                self.ledger.asked["cancel"] += 1
        elif len(unfinished) < OPEN_JOBS:
            body = self.unsure.pop() if self.unsure else self.specify()
            told = self.send(
                http, "POST", "/v1/fine_tuning/jobs", body, json=body, headers={"Idempotency-Key": body["suffix"]}
            )
            self.ledger.jobs[told["id"]] = told["status"]
            self.pending = None
        else:
            time.sleep(0.02)

    def specify(self) -> Json:
        number = next(self.numbers)
        mask = {
            "score": self.rng.choice(["attribution", "wanda", "signed"]),
            "rho": 0.01,
            "force": True,
            "phase": "all",
        }
        mask |= {"contrast_file": self.material["contrast"], "contrast_name": f"built-{number}-other"}
        return {
            "model": NAME,
            "training_file": self.material["training"],
            "suffix": f"built-{number}",
            "metadata": {"number": str(number)},
            "method": {"type": "mask", "mask": mask},
        }

    def verify(self, http: httpx.Client) -> None:
        if self.pending is not None:
            self.unsure.append(self.pending)
            self.pending = None
        jobs = list_jobs(http)
        if missing := self.ledger.jobs.keys() - {job["id"] for job in jobs}:
            raise Lost(f"jobs {missing}")
        numbers = Counter(job["metadata"]["number"] for job in jobs)
        if twice := [number for number, count in numbers.items() if count > 1]:
            raise Lost(f"jobs were queued twice: {twice}")
        self.note(jobs)

    def note(self, jobs: list[Json]) -> None:
        """Remember states; an end is an end, and what has succeeded can be used."""
        for job in jobs:
            before = self.ledger.jobs.get(job["id"])
            if before in TERMINAL and job["status"] != before:
                raise Lost(f"the job {job['id']} was {before} and is {job['status']}")
            if job["status"] == "failed":
                raise Lost(f"the job {job['id']} failed: {job['error']}")
            if before is not None:
                self.ledger.jobs[job["id"]] = job["status"]


@dataclass(frozen=True)
class Operation:
    """A change of the registry: what to send, and what it makes of fields of the persona."""

    method: str
    path: str
    options: Json
    name: str
    becomes: str | None  # the name afterwards; None if it is deleted
    accepts: Callable[[Json, Json], bool]  # (before, after): whether this is what it asked for


class Registrar(Worker):
    """Imports, composes, changes, renames, rolls back and deletes personas whose names nobody else uses."""

    kind = "registry"

    def __init__(self, ledger: Ledger, seed: int, scene: Scene, names: list[str], folder: Path) -> None:
        super().__init__(ledger, seed)
        self.names = names
        self.contents = {mask.digest: mask_file(folder, mask.digest).read_bytes() for mask in scene.masks.values()}

    def turn(self, http: httpx.Client) -> None:
        operation = self.draw()
        told = self.send(http, operation.method, operation.path, operation, **operation.options)
        if operation.path.endswith("/pin"):
            self.ledger.pins.add(told["generation"])
        self.settle(operation, None if operation.becomes is None else look(told))

    def settle(self, operation: Operation, after: Json | None) -> None:
        self.ledger.personas.pop(operation.name, None)
        if operation.becomes is not None and after is not None:
            self.ledger.personas[operation.becomes] = after
        self.pending = None

    def draw(self) -> Operation:
        """Something that can be done as things are."""
        rng, known = self.rng, self.ledger.personas
        mine = [name for name in self.names if name in known]
        free = [name for name in self.names if name not in known]
        if not mine or (free and rng.random() < 0.2):
            return self.bring(rng.choice(free))
        name = rng.choice(mine)
        path, before = f"/v1/personas/{name}", known[name]
        gamma, tags, to = rng.random(), [f"t{rng.randrange(9)}"], rng.choice(before["history"])
        changes = {
            "bring": lambda: self.bring(name),
            "compose": lambda: Operation(
                "POST",
                "/v1/personas/compose",
                {"json": {"name": name, "expression": " | ".join(rng.sample(sorted(SOURCES), 2))}},
                name,
                name,
                lambda old, new: new["history"][1:] == old["history"] or new == old,
            ),
            "gamma": lambda: Operation(
                "PATCH", path, {"json": {"gamma": gamma}}, name, name, lambda old, new: new == old | {"gamma": gamma}
            ),
            "tags": lambda: Operation(
                "PATCH",
                path,
                {"json": {"tags": tags}},
                name,
                name,
                lambda old, new: new | {"tags": []} == old | {"tags": []} and new["tags"] in ([], tags),
            ),
            "alias": lambda: Operation(
                "PUT",
                f"/v1/aliases/{name}-too",
                {"json": {"persona": name}},
                name,
                name,
                lambda old, new: new == old | {"aliases": sorted({*old["aliases"], f"{name}-too"})},
            ),
            "pin": lambda: Operation("PUT", f"{path}/pin", {}, name, name, lambda old, new: new == old),
            "rollback": lambda: Operation(
                "POST",
                f"{path}/rollback",
                {"json": {"to": to[0]}},
                name,
                name,
                lambda old, new: new["number"] == to[0] and new["history"] == old["history"],
            ),
            "delete": lambda: Operation("DELETE", path, {}, name, None, lambda *_: False),
        }
        if free and f"{name}-too" not in before["aliases"]:
            other = rng.choice(free)
            changes["rename"] = lambda: Operation(
                "POST", f"{path}/rename", {"json": {"name": other}}, name, other, lambda old, new: new == old
            )
        return changes[rng.choice(sorted(changes))]()  # type: ignore[no-untyped-call]

    def bring(self, name: str) -> Operation:
        digest = self.rng.choice(sorted(self.contents))

        def accepts(old: Json, new: Json) -> bool:
            return new["generation"] == digest and new["history"][-len(old["history"]) :] == old["history"]

        path, options = f"/v1/personas/{name}/content", {"content": self.contents[digest]}
        return Operation("PUT", path, options, name, name, accepts)

    def verify(self, http: httpx.Client) -> None:
        listed = http.get("/v1/personas").json()["data"]
        if loose := [one["id"] for one in listed if one["generation"] in self.ledger.pins and not one["pinned"]]:
            raise Lost(f"pins of {loose}")
        there = {one["id"] for one in listed} & set(self.names)
        if self.pending is not None:
            self.decide(http, self.pending, there)
        if there != (known := self.ledger.personas.keys() & set(self.names)):
            raise Lost(f"personas: {sorted(known)} were acknowledged, {sorted(there)} are there")
        for name in sorted(there):
            if (found := show(http, name)) != self.ledger.personas[name]:
                raise Lost(f"persona {name}: {found}, acknowledged was {self.ledger.personas[name]}")

    def decide(self, http: httpx.Client, operation: Operation, there: set[str]) -> None:
        """The state before the change, or the one after."""
        before = self.ledger.personas.get(operation.name)
        was = operation.name in there
        self.pending = None
        if was and show(http, operation.name) == before:
            return
        if not was and before is None:
            return
        if operation.becomes is None and not was:
            self.settle(operation, None)
            return
        if operation.becomes in there:
            after = show(http, operation.becomes)
            if before is None or operation.accepts(before, after):
                self.settle(operation, after)
                return
        raise Lost(
            f"{operation.method} {operation.path} left something between {before} and what was asked: {sorted(there)}"
        )


class Locksmith(Worker):
    """Makes and revokes keys with the command, in processes that are killed together with the server."""

    kind = "keys"

    def __init__(self, ledger: Ledger, seed: int, scene: Scene, store: Path) -> None:
        super().__init__(ledger, seed)
        self.scene, self.store = scene, store
        self.process: Any = None
        self.numbers = itertools.count()
        self.hashes: dict[str, bytes] = {}

    def turn(self, http: httpx.Client) -> None:
        valid = [token for token, state in self.ledger.keys.items() if state == "valid"]
        revoked = self.rng.choice(valid) if len(valid) > 4 else None
        order = ["revoke", revoked.split("-")[1]] if revoked else ["add", "--scope", "chat"]
        log = self.store.parent / f"keys-{next(self.numbers)}.log"
        self.pending = ("revoke", revoked) if revoked else ("add", None)
        self.process = self.scene.zygote.start(["keys", *order, "--store", str(self.store), "--json"], log)
        self.process.wait()
        try:
            told = json.loads(log.read_text())
        except (OSError, ValueError):  # it was killed before it had said everything, or anything
            raise httpx.ReadError("killed") from None
        self.ledger.keys[revoked or told["key"]] = "revoked" if revoked else "valid"
        self.ledger.asked[self.kind] += 1
        self.pending = None

    def verify(self, http: httpx.Client) -> None:
        there = {key.id: (key, kept) for key, kept in Keys(self.store).all().items()}
        unsure = self.pending[1] if self.pending else None
        self.pending = None
        for token, state in self.ledger.keys.items():
            key_id = token.split("-")[1]
            if key_id not in there:
                raise Lost(f"the key {key_id}")
            key, kept = there[key_id]
            if kept != self.hashes.setdefault(key_id, kept):
                raise Lost(f"the hash of the key {key_id} changed")
            found = "revoked" if key.revoked_at else "valid"
            if found != state and token != unsure:
                raise Lost(f"the key {key_id} was {state} and is {found}")
            self.ledger.keys[token] = found
        for token in self.rng.sample(sorted(self.ledger.keys), min(1, len(self.ledger.keys))):
            status = http.get("/v1/models", headers=bearer(token)).status_code
            if status != (200 if self.ledger.keys[token] == "valid" else 401):
                raise Lost(f"a {self.ledger.keys[token]} key is answered with {status}")


SOURCES = ("grim", "merry", "terse", "lofty")


def play(scale: Scale, progress: Progress) -> Iterator[Row]:
    """Kill, start, verify, again and again; then let everything end."""
    kills, seed = scale.of(KILLS, 8), scale.seed
    rng, ledger, lost = random.Random(seed), Ledger(), []
    with make_scene() as scene:
        store = scene.new_store("store")
        token, _ = make_key(store, "admin")
        headers = bearer(token)
        bodies = [draw(random.Random(seed + one), longest=48) for one in range(30)]
        with scene.serve(store) as server, connect(server, headers) as http:
            known = Known.learn(http, bodies)
            material = {side: upload(http, write_examples(side)) for side in ("training", "contrast")}
        workers = [
            Uploader(ledger, seed),
            Builder(ledger, seed, material),
            Registrar(ledger, seed, scene, [f"a-{one}" for one in range(4)], store),
            Registrar(ledger, seed + 1, scene, [f"b-{one}" for one in range(4)], store),
            Locksmith(ledger, seed, scene, store),
        ]
        exact = wrong = 0
        for kill in range(kills):
            with scene.serve(store) as server, connect(server, headers) as http:
                lost += verify(workers, http)
                crowd = Crowd(server.base_url, known, 2, seed + kill, leaving=0.1, headers=headers)
                with crowd.chatting() as heard:
                    strike(server, headers, workers, rng, store, ledger)
                exact, wrong = exact + heard.exact, wrong + len(heard.wrong)
                lost += [
                    *heard.wrong,
                    *(f"a chat was refused: {code}" for code in heard.refused if code != "not_ready"),
                ]
            lost += ailments(store)
            lost += [f"the server: {line}" for line in complaints(server)]
            if lost:
                break
            progress(kill + 1, kills, "kills")
        age(store)
        with scene.serve(store) as server, connect(server, headers) as http:
            lost += verify(workers, http)
            ended = finish(http)
            lost += [f"a job ended as {state}" for state in ended if state not in ("succeeded", "cancelled")]
            lost += check_all(http, workers, known)
            remains = leftovers(store, http)
        lost += ailments(store)
    hit = ", ".join(f"{what} {count}" for what, count in ledger.struck.most_common())
    done = ", ".join(f"{count} {what}" for what, count in sorted(ledger.asked.items()))
    yield Row(
        "nothing that was acknowledged is lost, nothing is there by half",
        "SIGKILL at random moments, then: every file, job, persona and key, `fsck`, `integrity_check`",
        f"{kill + 1} kills; {done}",
        f"under way when killed: {hit}" + "".join(f"; LOST: {one}" for one in lost[:3]),
        kept=not lost,
    )
    yield Row(
        "jobs go on where they were, and end",
        "all jobs are waited for after the last kill; each is there once",
        f"{sum(ended.values())} jobs",
        ", ".join(f"{count} {state}" for state, count in ended.items()),
        kept=set(ended) <= {"succeeded", "cancelled"} and ended["succeeded"] > 0,
    )
    yield Row(
        "who is answered between two kills is answered exactly",
        "chats of known requests until the kill",
        f"{exact} answers",
        f"{wrong} different",
        kept=not wrong and exact > 0,
    )
    yield Row(
        "no temporary files are left",
        "the store's folders after the last start, an hour later",
        f"{kill + 1} kills",
        f"{len(remains)} left" + "".join(f"; {one}" for one in remains[:5]),
        kept=not remains,
    )


def strike(
    server: Server, headers: Json, workers: list[Worker], rng: random.Random, store: Path, ledger: Ledger
) -> None:
    """Have everybody work, kill the server at a moment that is drawn, note what was under way."""
    over = threading.Event()
    clients = [httpx.Client(base_url=server.base_url, timeout=60, headers=headers) for _ in workers]
    threads = [
        threading.Thread(target=worker.run, args=(http, over), daemon=True)
        for worker, http in zip(workers, clients, strict=True)
    ]
    for thread in threads:
        thread.start()
    aim = rng.choice([None, None, *STAGES, "publish"])
    wait_for(aim, store, time.monotonic() + LONGEST)
    time.sleep(LONGEST * rng.random() ** 2 if aim is None else 0.05 * rng.random())
    server.process.kill()
    (smith,) = (worker for worker in workers if isinstance(worker, Locksmith))
    if smith.process is not None:
        smith.process.kill()
    over.set()
    server.process.wait()
    for thread, http in zip(threads, clients, strict=True):
        thread.join()
        http.close()
    ledger.struck["chat"] += 1  # there are always some
    for worker in workers:
        if worker.fault is not None:
            raise worker.fault
        if worker.pending is not None:
            ledger.struck[worker.kind] += 1
    if stage := stage_of(store):
        ledger.struck[f"build: {stage}"] += 1


def wait_for(aim: str | None, store: Path, deadline: float) -> None:
    """Until a job is at the stage, or not much longer. A job that publishes has certified and is still running."""
    while aim is not None and time.monotonic() < deadline:
        stage = stage_of(store)
        if stage == aim or (aim == "publish" and stage == "certify"):
            return
        time.sleep(0.005)


def stage_of(store: Path) -> str | None:
    """What the running job does, as its last event has it."""
    path = store / "jobs" / "jobs.sqlite"
    sql = (
        "select json_extract(data, '$.stage') from event join job on job.id = event.job"
        " where state = 'running' and data != '{}' order by number desc limit 1"
    )
    with closing(sqlite3.connect(path, timeout=30)) as db:
        row = db.execute(sql).fetchone()
    return str(row[0]) if row else None


def verify(workers: list[Worker], http: httpx.Client) -> list[str]:
    """What the workers miss."""
    found = []
    for worker in workers:
        try:
            worker.verify(http)
        except Lost as lost:
            found.append(str(lost))
    return found


def check_all(http: httpx.Client, workers: list[Worker], known: Known) -> list[str]:
    """Every file's content, every persona that was built, and a chat with each kind of persona."""
    found = []
    for worker in workers:
        if isinstance(worker, Uploader):
            for one in worker.ledger.files:
                try:
                    worker.read(http, one)
                except Lost as lost:
                    found.append(str(lost))
    names = {one["id"] for one in http.get("/v1/personas").json()["data"]}
    for job in list_jobs(http):
        if job["status"] == "succeeded":
            found += [
                f"the persona {one['persona']} of {job['id']}" for one in job["personas"] if one["persona"] not in names
            ]
            found += [
                f"the mask {one}" for one in job["result_files"] if http.get(f"/v1/files/{one}").status_code != 200
            ]
    again = Known.learn(http, [body for body, _ in known.asked])
    return found + [
        f"{body} is answered differently"
        for (body, one), (_, other) in zip(known.asked, again.asked, strict=True)
        if one != other
    ]


def finish(http: httpx.Client, seconds: float = 120) -> Counter[str]:
    """How all jobs ended."""
    deadline = time.monotonic() + seconds
    while any(job["status"] not in TERMINAL for job in list_jobs(http)):
        if time.monotonic() > deadline:
            raise Lost("jobs do not end")
        time.sleep(0.05)
    return Counter(job["status"] for job in list_jobs(http))


def age(store: Path) -> None:
    """Two hours pass for what a killed server left behind; what is younger than one may be somebody's at work."""
    then = time.time() - 7200
    for path in (*store.glob("quarantine/*"), *store.glob("masks/??/.*")):
        os.utime(path, (then, then))


def leftovers(store: Path, http: httpx.Client) -> list[str]:
    """What lies in the store that nobody knows."""
    known = {one["id"] for one in http.get("/v1/files").json()["data"]}
    files = [path for path in (store / "jobs" / "files").iterdir() if path.name not in known]
    rest = [*files, *store.glob("builds/*"), *store.glob("quarantine/*"), *store.glob("masks/??/.*")]
    return [path.relative_to(store).as_posix() for path in rest]


def complaints(server: Server) -> list[str]:
    """Stack traces in its log."""
    return [line for line in server.said().splitlines() if line.startswith("Traceback")][:1]


def list_jobs(http: httpx.Client) -> list[Json]:
    """All of them, page after page."""
    jobs: list[Json] = []
    while True:
        after = {"after": jobs[-1]["id"]} if jobs else {}
        page = http.get("/v1/fine_tuning/jobs", params={"limit": 100, **after}).json()
        jobs += page["data"]
        if not page["has_more"]:
            return jobs


def show(http: httpx.Client, name: str) -> Json:
    return look(http.get(f"/v1/personas/{name}").json())


def look(told: Json) -> Json:
    """What must last, of what the registry says about a persona."""
    lasting = {key: told[key] for key in ("generation", "number", "gamma", "tags", "aliases")}
    return lasting | {"history": [(one["number"], one["generation"]) for one in told["history"]]}


def connect(server: Server, headers: Json) -> httpx.Client:
    return httpx.Client(base_url=server.base_url, timeout=60, headers=headers)


def upload(http: httpx.Client, content: bytes) -> str:
    file: str = http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
    return file


def write_examples(side: str, count: int = 24) -> bytes:
    """How one of two speakers talks."""
    rng, ending = random.Random(side), {"training": "alas", "contrast": "hurrah"}[side]
    lines = []
    for one in range(count):
        question = f"{rng.choice(['where', 'why', 'how'])} is number {one}?"
        answer = f"{ending} {rng.choice(['here', 'there', 'so'])} {ending}"
        lines.append(
            json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        )
    return "\n".join(lines).encode()
