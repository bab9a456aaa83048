"""The cost of changing between masks, and of having more masks than fit on the device.

`python -m benchmarks.swap --json [--quick]` measures: the CPU time that a mask adds to a step if it differs from the
last step's; the time to load a mask from disk, relative to reading its file; the time to the first token and the
throughput when 32 personas alternate in a space for 8 masks; and the effect of a hanging load on other requests.

A cold load covers all steps from the request for a digest to a mask that is ready for use: header, identity, sha256 of
all bytes the first time that a file is read (afterwards a pass that brings them into the page cache), shapes and pad
bits, and the corrections of all Linears. "From disk" means that the file was dropped from the page cache before.

Clients are threads that request their mask, submit to the running engine and wait for the last token. The cost of a
step is CPU time, everything else wall time.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks._report import Figure, report
from benchmarks._world import VOCABULARY, make_base
from benchmarks.engine import GREEDY, make_prompts, start_decoding
from benchmarks.engine import QUICK as SMALL
from benchmarks.maskstore import BASE, LAYERS
from benchmarks.maskstore import write as write_large
from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, MaskReader, Store, encode
from masquerade.engine import Engine, Finished, Request
from masquerade.model import (
    AppliedMask,
    Base,
    MaskManager,
    Residency,
    ResidentMask,
    VerifiedStore,
    find_targets,
)

SPARSE, DENSE = 0.003, 0.5
KINDS = (("sparse 0.3 %", SPARSE), ("bitmap", DENSE))
PERSONAS, ROOM = 32, 8
TURNS, WARM = 50, 10  # of `decode`


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    model: dict[str, int]
    layers: int  # of the 8B-shaped mask
    prompt: int
    new: int
    turns: int  # requests per run and persona
    repeats: int
    switches: int
    cases: tuple[tuple[str, float, int], ...]  # of measure_capacity: kind, share pruned, clients


MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
NARROW = MODEL | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
CASES = (("sparse 0.3 %", SPARSE, 8), ("bitmap", DENSE, 8), ("sparse 0.3 %", SPARSE, 32))
FULL = Scale(MODEL, LAYERS, 128, 16, 1, 1, 1500, CASES)  # 30 M parameters
QUICK = Scale(SMALL.model, 4, 64, 8, 1, 1, 300, CASES[:1])


class BlockingStore(VerifiedStore):
    """A store in which reading the mask `blocked` waits for `released`."""

    blocked: str | None = None
    released = threading.Event()

    def read(self, digest: str) -> Mask:
        if digest == self.blocked:
            self.released.wait()
        return super().read(digest)


@dataclass(frozen=True)
class World:
    """A base, its mask manager, and a store with personas."""

    base: Base
    manager: MaskManager
    verified_store: BlockingStore
    digests: list[str]
    largest: int  # device bytes of a mask

    def residency(self, room: int) -> Residency:
        return Residency(self.manager, self.verified_store, room * self.largest)


def make_world(scale: Scale, rho: float, folder: Path, personas: int = PERSONAS) -> World:
    base = make_base(scale.model)
    manager, store = MaskManager.attach(base.model), Store(folder)
    verified_store = BlockingStore(store, base.fingerprint)
    digests = [store.add(make_mask(base, rho, seed)) for seed in range(personas)]
    sizes = []
    for digest in digests:
        with verified_store.open(digest) as reader:
            sizes.append(manager.measure(reader))
    time.sleep(2.5)  # files younger than this are verified on every load
    return World(base, manager, verified_store, digests, max(sizes))


def make_mask(base: Base, rho: float, seed: int) -> Mask:
    rng = np.random.default_rng(seed)
    targets = {
        name: encode(rng.random((linear.out_features, linear.in_features), np.float32) < rho)
        for name, linear in find_targets(base.model).items()
    }
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


# --- a change of the mask between steps


def measure_switch(scale: Scale) -> Iterator[Figure]:
    """A decode step with a new mask, a request for a resident mask, and a decode step with a mask."""
    for name, rho in KINDS:
        for rows in (1, 16):
            case = f"{rows} requests, all of them others" if rows > 1 else "one request"
            figure = f"what another persona than the last step's adds to a step, {case}, {name}"
            yield Figure(figure, time_switch(rho, rows, scale.switches), "CPU-us", "<= 20" if rows == 1 else None)
    for name, rho in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            world = make_world(scale, rho, Path(folder), personas=2)
            residency = world.residency(2)
            masks = [residency.get(digest) for digest in world.digests[:2]]
            if rho == SPARSE:
                yield Figure(
                    "asking for a mask that is there", time_request(residency, world.digests[:2]), "CPU-us", "<= 10"
                )
            plain, masked = time_steps(world.base, masks)
            yield Figure(f"decode step of one request, {name}", masked, "CPU-us")
            yield Figure(f"what a persona adds to a decode step, {name} / base", masked / plain, "x")
            residency.close()


def time_request(residency: Residency, digests: Sequence[str]) -> float:
    turns = cycle(digests)
    started = time.thread_time()
    for _ in range(10_000):
        residency.request(next(turns)).result()
    return (time.thread_time() - started) / 10_000 * 1e6


def time_switch(rho: float, rows: int, switches: int) -> float:
    """us that a step of the engine takes longer if its requests have other masks than in the last step: the median over
    pairs of a step with other masks and one with the same. The mean of both orders, since a pair's steps differ anyway.

    The model has as many Linears as the others here, but small ones and one head, so that reading weights and the cache
    does not hide the cost.
    """
    base = make_base(NARROW)
    manager = MaskManager.attach(base.model)
    masks = [AppliedMask(manager.fit(make_mask(base, rho, seed)), 0.0) for seed in range(rows + 1)]
    differences: list[list[float]] = [[], []]
    for turn, (engine, requests) in enumerate(decode(base, rows, switches)):
        spent = {}
        for changes in (True, False) if turn % 2 else (False, True):
            if changes:
                for row, request in enumerate(requests):
                    request.applied = masks[(row + turn) % len(masks)]
            spent[changes] = time_step(engine)
        differences[turn % 2].append(spent[True] - spent[False])
    return float(np.mean([np.median(one) for one in differences])) * 1e6


def time_steps(base: Base, masks: Sequence[ResidentMask]) -> tuple[float, float]:
    """us of a step of the engine with the base, and of a step with a mask; two masks alternate."""
    times: list[list[float]] = [[], []]
    applied = cycle(AppliedMask(mask, 0.0) for mask in masks)
    for engine, (request,) in decode(base, 1, 400):
        for spent, mask in zip(times, (None, next(applied)), strict=True):
            request.applied = mask
            spent.append(time_step(engine))
    plain, masked = (float(np.percentile(spent, 25)) * 1e6 for spent in times)
    return plain, masked


def decode(base: Base, rows: int, turns: int) -> Iterator[tuple[Engine, Sequence[Request]]]:
    """An engine and its running requests, so many times; two decode steps may be made each time. Their contexts stay
    short, since the requests are others from time to time, and a few steps warm each of them up.
    """
    for _ in range(-(-turns // TURNS)):
        engine = start_decoding(base, rows, [None])
        requests = list(engine._scheduler.running)
        for _ in range(WARM):
            engine.step()
        for _ in range(TURNS):
            yield engine, requests
        engine.stop()


def time_step(engine: Engine) -> float:
    started = time.thread_time()
    engine.step()
    return time.thread_time() - started


# --- from disk to ready


def measure_cold(scale: Scale) -> Iterator[Figure]:
    """An 8B-shaped bitmap mask, for a model whose weights are never accessed and so take no memory."""
    base = make_outline(scale.layers)
    manager = MaskManager.attach(base)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # /tmp may be memory
        store = Store(folder)
        write_large(Path(folder, "mask"), scale.layers)
        digest = adopt(store, Path(folder, "mask"))
        path = store.path(digest)
        size = path.stat().st_size
        time.sleep(2.5)
        yield Figure(f"file (8B-shaped bitmap, {scale.layers} of {LAYERS} layers)", size / 1e6, "MB")
        yield Figure("sha256 of bytes in memory, one thread", time_hash() / 1e9, "GB/s")
        for where, before in (("from disk", drop), ("from the system's cache", read)):
            seconds: dict[str, list[float]] = {"read": [], "first": [], "again": []}
            for _ in range(3):
                before(path)
                seconds["read"].append(clock(partial(read, path)))
                verified_store = VerifiedStore(store, BASE.fingerprint)
                for kind in ("first", "again"):
                    seconds[kind].append(
                        time_load(Residency(manager, verified_store, 2**31), digest, partial(before, path))
                    )
            best = {kind: min(times) for kind, times in seconds.items()}
            yield Figure(f"reading the file {where}", size / best["read"] / 1e9, "GB/s")
            for kind, what in (("first", "verified"), ("again", "verified before")):
                bound = ">= 0.5" if before is drop else None
                yield Figure(f"cold load {where}, {what}", size / best[kind] / 1e9, "GB/s")
                yield Figure(f"cold load {where}, {what} / reading", best["read"] / best[kind], "x", bound)


def time_hash() -> float:
    """Bytes per second, the best of five: the limit of a verifying load on one thread."""
    block = bytes(2**26)
    return len(block) / min(clock(lambda: hashlib.sha256(block).digest()) for _ in range(5))


def adopt(store: Store, path: Path) -> str:
    with MaskReader(path, verify=False) as reader:
        digest = reader.digest
    store.path(digest).parent.mkdir(parents=True)
    os.replace(path, store.path(digest))
    return digest


def make_outline(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.to_empty(device="cpu").eval().requires_grad_(False)


def time_load(residency: Residency, digest: str, prepare: Callable[[], None]) -> float:
    prepare()
    seconds = clock(partial(residency.get, digest))
    residency.close()
    return seconds


def drop(path: Path) -> None:
    """Drop a file from the page cache, which keeps pages that are mapped."""
    gc.collect()  # a closed residency is a reference cycle with its last mask
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> None:
    buffer = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- more masks than fit on the device


def measure_capacity(scale: Scale) -> Iterator[Figure]:
    """Alternating personas, with space for all masks and for a quarter of them."""
    for name, rho, clients in scale.cases:
        with tempfile.TemporaryDirectory() as folder:
            world = make_world(scale, rho, Path(folder))
            runs: dict[int, list[Run]] = {PERSONAS: [], ROOM: []}
            for _ in range(scale.repeats):
                for room, made in runs.items():
                    made.append(run_turns(world, scale, room, clients))
        first = {room: float(np.median([t for run in made for t in run.firsts])) for room, made in runs.items()}
        rate = {room: max(run.rate for run in made) for room, made in runs.items()}
        case, less = f"{PERSONAS} personas in turns, {clients} clients, {name}", f"room for {ROOM} / all masks"
        bounds = ("<= 2", ">= 0.7") if clients <= ROOM else (None, None)
        yield Figure(f"{case}: first token, all masks, median", first[PERSONAS] * 1e3, "ms")
        yield Figure(f"{case}: first token, {less}", first[ROOM] / first[PERSONAS], "x", bounds[0])
        yield Figure(f"{case}: throughput, all masks", rate[PERSONAS], "tokens/s")
        yield Figure(f"{case}: throughput, {less}", rate[ROOM] / rate[PERSONAS], "x", bounds[1])
        yield Figure(f"{case}: loads, room for {ROOM}", runs[ROOM][0].loads, "")


@dataclass(frozen=True)
class Run:
    """The results of one run."""

    firsts: list[float]  # seconds from the request to the first token
    rate: float  # completion tokens per second
    loads: int


def run_turns(world: World, scale: Scale, room: int, clients: int) -> Run:
    residency = world.residency(room)
    if room == PERSONAS:
        for digest in world.digests:
            residency.get(digest)
    engine = Engine(world.base)
    engine.start()
    before = residency.loads.done
    turns, total = count(), PERSONAS * scale.turns
    prompts = make_prompts(total, (scale.prompt, scale.prompt))
    firsts: list[float] = []

    def run_client() -> None:
        while (turn := next(turns)) < total:
            firsts.append(ask(engine, residency, world.digests[turn % PERSONAS], prompts[turn], scale.new))

    seconds = clock(lambda: run_threads([run_client] * clients))
    engine.stop()
    residency.close()
    return Run(firsts, total * scale.new / seconds, residency.loads.done - before)


def ask(engine: Engine, residency: Residency, digest: str, prompt: list[int], new: int) -> float:
    """Seconds to the first token of an answer; returns after the last."""
    started, first, done = time.perf_counter(), [0.0], threading.Event()

    def receive(event: object) -> None:
        if isinstance(event, Finished):
            done.set()
        elif not first[0]:
            first[0] = time.perf_counter() - started

    engine.submit(Request(prompt, new, receive, AppliedMask(residency.get(digest), 0.0), sampling=GREEDY))
    done.wait()
    return first[0]


def run_threads(works: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- a load that hangs


def measure_hanging(scale: Scale) -> Iterator[Figure]:
    """Four clients of resident and cold masks, with and without a load that hangs."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(scale, SPARSE, Path(folder))
        engine = Engine(world.base)
        engine.start()
        firsts: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(2 * scale.repeats):
            for hanging in firsts:
                residency = world.residency(PERSONAS)
                for digest in world.digests[1:17]:
                    residency.get(digest)
                world.verified_store.blocked = world.digests[0] if hanging else None
                world.verified_store.released.clear()
                stuck = residency.request(world.digests[0]) if hanging else None

                def run_client(
                    start: int, residency: Residency = residency, times: list[float] = firsts[hanging]
                ) -> None:
                    rng = random.Random(start)
                    for digest in world.digests[1 + start :: 4]:  # half of them resident
                        prompt = [rng.randrange(4, VOCABULARY) for _ in range(scale.prompt)]
                        times.append(ask(engine, residency, digest, prompt, 4))

                run_threads([lambda start=start, run=run_client: run(start) for start in range(4)])  # type: ignore[misc]
                assert stuck is None or not stuck.done()
                world.verified_store.released.set()
                residency.close()
        engine.stop()
    quiet, blocked = (firsts[hanging] for hanging in (False, True))
    yield Figure("median time to first token of others, quiet", float(np.median(quiet)) * 1e3, "ms")
    for name, pick in (("median", 50), ("95th percentile of the", 95)):
        ratio = float(np.percentile(blocked, pick) / np.percentile(quiet, pick))
        yield Figure(f"{name} time to first token of others while a load hangs / quiet", ratio, "x", "<= 1.25")


PARTS = {"switch": measure_switch, "cold": measure_cold, "cliff": measure_capacity, "hanging": measure_hanging}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smaller model and mask; within a minute")
    parser.add_argument("--only", choices=sorted(PARTS), help="one part of it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    scale = QUICK if options.quick else FULL
    parts = [PARTS[options.only]] if options.only else list(PARTS.values())
    report("swap", [figure for part in parts for figure in part(scale)], options.json)


if __name__ == "__main__":
    main()
