"""A server that does everything at once for a long time: its memory, files and threads stay, and so does its speed.

Knows the demo with its personas: chats streamed and whole, clients that leave, builds one after the other, personas
that come, change and go. Refuses to judge the first part, in which caches fill.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import httpx
from openai import APIError

from tests.building.asking import build, connect, finish
from tests.reliability.crowd import TIMEOUT, Crowd, Heard, Known, draw
from tests.reliability.report import Progress, Row, Scale
from tests.reliability.scene import ailments
from tests.serving import Server, serve

SECONDS = 1200
WARM = 0.25  # share of the time that is not judged
PERSONAS = ("formal", "casual", "gloomy", "cheerful", "introvert", "extravert")
CLIENTS = 4
BLOCKS = 10  # means of so many stretches of time make the slope
GROWTH = 0.03  # of the memory, over what is judged, that is noise
SLOWER = 1.5
CACHE = 16 << 20  # bytes of keys and values, so few that the prefix cache is full before memory is judged
TELLING = 300  # seconds that a soak must take for its memory to be judged


@dataclass(frozen=True)
class Sample:
    """A server at a moment."""

    at: float
    resident: int  # bytes
    files: int
    threads: int


@dataclass
class Churn:
    """Changes of the registry, and builds, until it is over."""

    base_url: str
    seed: int
    over: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def change(self) -> None:
        """A persona is imported or composed, changed, named again, rolled back, used and deleted."""
        rng = random.Random(self.seed)
        with httpx.Client(base_url=self.base_url, timeout=TIMEOUT) as http:
            content = http.get("/v1/personas/formal/content").content
            turn = 0
            while not self.over.is_set():
                turn += 1
                name, other = f"guest-{turn % 7}", f"renamed-{turn % 7}"
                pair = rng.sample(PERSONAS[:4], 2)
                for what, method, path, options in (
                    ("import", "PUT", f"/v1/personas/{name}/content", {"content": content}),
                    (
                        "compose",
                        "POST",
                        "/v1/personas/compose",
                        {"json": {"name": name, "expression": " | ".join(pair)}},
                    ),
                    ("change", "PATCH", f"/v1/personas/{name}", {"json": {"gamma": rng.random(), "tags": ["npc"]}}),
                    ("chat", "POST", "/v1/chat/completions", {"json": _chat(f"demo:{name}")}),
                    ("rename", "POST", f"/v1/personas/{name}/rename", {"json": {"name": other}}),
                    ("roll back", "POST", f"/v1/personas/{other}/rollback", {"json": {}}),
                    ("delete", "DELETE", f"/v1/personas/{other}", {}),
                ):
                    answer = http.request(method, path, **options)  # type: ignore[arg-type]
                    self.done[what] += 1
                    if answer.status_code >= 300:
                        self.faults.append(f"{what}: {answer.status_code} {answer.text:.200}")
                self.over.wait(0.5)

    def build(self, server: Server) -> None:
        """One job after the other, so that there is always one."""
        with connect(server) as sdk:
            while not self.over.is_set():
                try:
                    ended = finish(sdk, build(sdk, "built", replace=True).id)
                except APIError as error:
                    self.faults.append(f"a build: {error}")
                    return
                self.done["builds"] += 1
                if ended.status != "succeeded":
                    self.faults.append(f"a build: {ended.status} {ended.error}")


def play(scale: Scale, progress: Progress) -> Iterator[Row]:
    """Everything at once, and a look at the server every few seconds."""
    seconds, rng = scale.of(SECONDS, 24), random.Random(scale.seed)
    bodies = [draw(rng, "demo", PERSONAS, longest=40) for _ in range(60)]
    with tempfile.TemporaryDirectory(prefix="masquerade-soak-") as folder:
        store = Path(folder, "store")
        with serve("--model", "demo", "--store", str(store), "--cache-bytes", str(CACHE)) as server:
            with httpx.Client(base_url=server.base_url, timeout=TIMEOUT) as http:
                known = Known.learn(http, bodies)
            churn = Churn(server.base_url, scale.seed)
            threads = [threading.Thread(target=churn.change), threading.Thread(target=churn.build, args=(server,))]
            crowd = Crowd(server.base_url, known, CLIENTS, scale.seed, leaving=0.1)
            for thread in threads:
                thread.start()
            with crowd.chatting() as heard:
                samples = list(watch(server.process.pid, seconds, progress))
            churn.over.set()
            for thread in threads:
                thread.join()
            faults = [*churn.faults, *ailments(store)]
            if "Traceback" in server.said():
                faults.append("stack traces in its log")
    yield from judge(samples, heard, churn, faults)


def watch(pid: int, seconds: float, progress: Progress) -> Iterator[Sample]:
    """A sample a second at first and every five later, until the time is over."""
    started = time.monotonic()
    pause = min(5.0, seconds / 60)
    while (at := time.monotonic() - started) < seconds:
        yield look(pid, at)
        progress(at, seconds, "seconds of soaking")
        time.sleep(pause)


def look(pid: int, at: float) -> Sample:
    proc = Path(f"/proc/{pid}")
    resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Sample(at, resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")))


def judge(samples: Sequence[Sample], heard: Heard, churn: Churn, faults: list[str]) -> Iterator[Row]:
    """The rows of a soak."""
    length = samples[-1].at
    judged = [sample for sample in samples if sample.at >= WARM * length]
    did = ", ".join(f"{count} {what}" for what, count in churn.done.items())
    yield Row(
        "every answer is the one its request got alone",
        "chats streamed and whole, personas, strengths, drawn and greedy",
        f"{heard.exact} answers in {length / 60:.1f} minutes, {heard.left} clients left",
        f"{len(heard.wrong)} different, {sum(heard.refused.values())} refused, {heard.lost} cut off"
        + "".join(f"; {one}" for one in heard.wrong[:2]),
        kept=not heard.wrong and not heard.refused and not heard.lost and heard.exact > 0,
    )
    yield Row(
        "builds and changes go on beside it, and the store stays whole",
        "one build after the other; personas come, change and go",
        did,
        f"{len(faults)} faults" + "".join(f"; {one}" for one in faults[:3]),
        kept=not faults and churn.done["builds"] > 0,
    )
    growth, noise = find_growth([(sample.at, sample.resident) for sample in judged])
    size = mean(sample.resident for sample in judged)
    minutes = (judged[-1].at - judged[0].at) / 60
    telling = length >= TELLING
    yield Row(
        "memory does not grow",
        f"resident bytes after the first {WARM:.0%}: a trend below {GROWTH:.0%}, or below three times its own error",
        f"{len(judged)} samples",
        f"{size / 2**20:.0f} MiB; trend {growth / 2**20:+.1f} ± {noise / 2**20:.1f} MiB over {minutes:.1f} minutes"
        + ("" if telling else ", too short to tell: the first builds still make it grow"),
        kept=growth < max(GROWTH * size, 3 * noise) if telling else None,
    )
    for what in ("files", "threads"):
        values = [getattr(sample, what) for sample in judged]
        first, last = values[: len(values) // 3], values[-(len(values) // 3) :]
        yield Row(
            f"open {what} stay" if what == "files" else "threads stay",
            "the last third has hardly more than the first",
            f"{len(values)} samples",
            f"{mean(first):.1f} in the first third, {mean(last):.1f} in the last, {max(values)} at most",
            kept=mean(last) <= 1.1 * mean(first) + 2,
        )
    times = sorted(heard.times)
    third = len(times) // 3
    early, late = (_quantile([seconds for _, seconds in part], 0.95) for part in (times[:third], times[-third:]))
    yield Row(
        "it stays as fast",
        f"p95 of whole answers in the last third against the first, at most {SLOWER:g} times",
        f"{2 * third} answers",
        f"{1000 * early:.0f} ms, then {1000 * late:.0f} ms",
        kept=third > 0 and late <= SLOWER * early,
    )


def find_growth(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """By how much a line through the means of blocks rises from end to end, and the standard error of that. Means,
    because neighbouring samples are alike and would make the error look small.
    """
    size = max(1, len(points) // BLOCKS)
    blocks = [points[at : at + size] for at in range(0, len(points) - size + 1, size)]
    xs, ys = ([mean(point[axis] for point in block) for block in blocks] for axis in (0, 1))
    if len(xs) < 3 or stdev(xs) == 0:
        return 0.0, 0.0
    middle, level = mean(xs), mean(ys)
    spread = sum((x - middle) ** 2 for x in xs)
    slope = sum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - level - slope * (x - middle)) ** 2 for x, y in zip(xs, ys, strict=True))
    error = (rest / (len(xs) - 2) / spread) ** 0.5
    length = points[-1][0] - points[0][0]
    return slope * length, error * length


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))] if values else float("nan")


def _chat(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8}
