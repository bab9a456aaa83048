"""Decode steps, prompts, loads and the engine on a CUDA device: personas beside the base, a plain model and PEFT.

`python -m benchmarks.gpu --json [--quick] [--out FILE] [--seconds 480] [--no-tests]`. It runs unattended. First the
tests of kernels, CUDA graphs and the engine against their oracles: if one fails, nothing is measured. Then one row of
measurements after another, the most important ones first: figures go to stderr and, as JSON lines, to FILE as soon as
their row is done. A row that fails, or for which no time is left, is named instead.

The model is a random Llama of the 8B shape in bf16; each row of a decode step has 512 positions of context. Cases are
interleaved and the median of each counts. The time of a decode step is that of repetitions of its graph, so the host's
work is not included; that of a switch is a separate figure. The base's step of as many rows is beside every other one.
The personas of a form differ in their memory only: all prune the same weights. PEFT, if it is installed, runs the same
model with a rank-16 adapter of all Linears for each persona, mixed in one batch. Without a CUDA device nothing is
measured.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count as counter
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig

from benchmarks._device import BITMAP, SINGLE, SPARSE, Scale, Steps, World
from benchmarks._report import Figure, LeftOut, arguments, follow, report
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams, attention
from masquerade.model import AppliedMask, HostCache

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_triton.py",
    "tests/kernels/test_correction.py",
    "tests/engine/test_cuda_attention.py",
    "tests/engine/test_cuda.py",
)
FULL = Scale()
QUICK = replace(FULL, layers=8, rows=(1, 16), personas=(1, 16), repeats=5)
GREEDY = SamplingParams(temperature=0)
DECODING = 16  # rows of steps that are measured with one number of rows only


def main() -> None:
    started = time.monotonic()
    parser = arguments(__doc__, quick="a quarter of the layers, and up to 16 rows")
    parser.add_argument("--out", type=Path, help="a file that each figure is appended to, as a line of JSON")
    parser.add_argument(
        "--seconds", type=float, default=480, help="after so many no further row is begun (%(default)s)"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure without running the tests before")
    options = parser.parse_args()
    results: list[Figure | LeftOut] = []
    if torch.cuda.is_available():
        if not options.no_tests:
            run_tests()
        scale, until = QUICK if options.quick else FULL, started + options.seconds
        results = follow("gpu", measure(scale, torch.device("cuda"), until), options.out)
    else:
        print("there is no CUDA device; nothing was measured", file=sys.stderr)
    report("gpu", results, options.json)


def run_tests(*options: str) -> None:
    """Run the tests that need a device. Ends the process if one fails; pytest's output is on stderr.

    The plugin has the fixtures that they need: those of `tests/conftest.py` import the packages of a server.
    """
    pytest = [sys.executable, "-m", "pytest", "--noconftest", "-p", "tests.small_world", "-p", "no:cacheprovider"]
    done = subprocess.run([*pytest, "-m", "gpu", *TESTS, *options], cwd=ROOT, stdout=sys.__stderr__, check=False)
    if done.returncode:
        sys.exit(f"the tests failed (pytest's exit status is {done.returncode}), so nothing was measured")


@dataclass(frozen=True)
class Row:
    """Measurements that belong together, by a name that stands for them if they are left out."""

    name: str
    measure: Callable[[], Iterator[Figure]]


def measure(scale: Scale, device: torch.device, until: float) -> Iterator[Figure | LeftOut]:
    """All figures of the rows that begin before `until`, in seconds of `time.monotonic`. On a CPU, which only tests do,
    steps run in Triton's interpreter and nothing is captured.
    """
    world = World(scale, device)
    for row in list_rows(world):
        if time.monotonic() >= until:
            yield LeftOut(row.name, "no time was left")
            continue
        print(f"measuring {row.name}", file=sys.stderr, flush=True)
        try:
            with torch.inference_mode():
                figures = list(row.measure())
        except Exception as error:  # nobody is there to start the rest
            traceback.print_exc()
            yield LeftOut(row.name, f"{type(error).__name__}: {error}")
        else:
            yield from figures
    why = "not installed" if importlib.util.find_spec("vllm") is None else "not supported here"
    yield LeftOut(
        "vLLM with LoRA", f"{why}: its wheels pin a torch of their own, and are too large to be carried along"
    )


def list_rows(world: World) -> Iterator[Row]:
    """All rows, the most important ones first."""
    scale = world.scale
    yield Row("the bandwidth at 1 row", partial(measure_floor, world))
    first = min(DECODING, max(scale.rows))
    yield Row(f"decode steps, {first} rows, {SPARSE}", partial(measure_steps, world, SPARSE, first))
    yield Row("launches", partial(measure_launches, world))
    yield Row("base traffic", partial(measure_base_traffic, world))
    yield Row("the engine", partial(measure_engine, world))
    yield Row(f"prefill of {scale.prefill} positions", partial(measure_prefill, world))
    for form in (BITMAP, SPARSE):
        yield Row(f"cold loads during decode, {form}", partial(measure_loads, world, form))
    for form in scale.forms:
        for rows in scale.rows:
            if (form, rows) != (SPARSE, first):
                yield Row(f"decode steps, {rows} rows, {form}", partial(measure_steps, world, form, rows))
    yield Row("a soft bitmap, and a switch", partial(measure_rest, world))
    yield Row(f"PEFT with {scale.adapters} adapters", partial(measure_peft, world))


def measure_floor(world: World) -> Iterator[Figure]:
    """A step of one row beside what reading its bytes takes at the speed of a copy."""
    yield Figure("memory's speed, a copy's reads and writes", world.copy_speed / 1e9, "GB/s")
    personas = world.find_personas(SPARSE, 1)
    cases = {"base": [None], f"1 persona, {SPARSE}": personas}
    steps = {name: partial(world.steps.settle, 1, masks) for name, masks in cases.items()}
    for name, seconds in world.clock.compare(steps, world.scale).items():
        floor = world.count_bytes(1, cases[name]) / world.copy_speed
        yield Figure(f"step of 1 row, {name}", seconds * 1e3, "ms")
        yield Figure(f"step of 1 row, {name} / reading its bytes once", seconds / floor, "x", "<= 1.15")


def measure_steps(world: World, form: str, rows: int) -> Iterator[Figure]:
    """Steps of one number of rows, of the base and of personas of a form."""
    cases: dict[int, Sequence[AppliedMask | None]] = {0: [None]}
    cases |= {count: world.find_personas(form, count) for count in world.scale.personas if count <= rows}
    steps = {str(count): partial(world.steps.settle, rows, masks) for count, masks in cases.items()}
    times = world.clock.compare(steps, world.scale)
    yield Figure(f"step, {rows} rows of the base, beside {form}", times["0"] * 1e3, "ms")
    for count, masks in cases.items():
        seconds, what = times[str(count)], f"{count} personas, {form}" if count else f"the base, beside {form}"
        if count:
            reach = "<= 1.10" if (form, count) == (SPARSE, 16) else None
            yield Figure(f"step, {rows} rows, {what} / base", seconds / times["0"], "x", reach)
        rate = world.count_bytes(rows, masks) / seconds
        yield Figure(f"step, {rows} rows, {what}: bytes read a second / a copy's", rate / world.copy_speed, "x")


def measure_launches(world: World) -> Iterator[Figure]:
    """Steps whose lists have next to nothing in them, so that their corrections cost little but their launches."""
    rows = min(DECODING, max(world.scale.rows))
    cases: dict[str, Sequence[AppliedMask | None]] = {"base": [None]}
    cases |= {form: world.find_personas(form, rows) for form in (SINGLE, SPARSE)}
    steps = {name: partial(world.steps.settle, rows, masks) for name, masks in cases.items()}
    times = world.clock.compare(steps, world.scale)
    for form in (SINGLE, SPARSE):
        what = f"{rows} rows, {rows} personas, {form}"
        yield Figure(f"step, {what}, beyond the base's", (times[form] - times["base"]) * 1e6, "us")


def measure_base_traffic(world: World) -> Iterator[Figure]:
    """Steps of base rows while personas are on the device, beside those of the model without a mask manager."""
    world.find_personas(SPARSE, 1)
    with world.detach(attention.NAME):
        plain = Steps(world.base, world.kv, world.scale)
        runs = {rows: plain.settle(rows, [None]) for rows in world.scale.rows}
    for rows, run in runs.items():
        cases = {"plain": lambda run=run: run, "base": partial(world.steps.settle, rows, [None])}  # type: ignore[misc]
        times = world.clock.compare(cases, world.scale)
        ratio = times["base"] / times["plain"]
        yield Figure(f"step, {rows} rows of the base with personas enabled / a plain model", ratio, "x", "<= 1.02")


def measure_engine(world: World) -> Iterator[Figure]:
    """Requests of the base and of personas to the engine, the host's work included, beside transformers' `generate`."""
    scale, seeds = world.scale, counter()
    personas = world.find_personas(SPARSE, scale.adapters)
    engine = Engine(world.base, EngineConfig(max_running=scale.requests, cache_bytes=2**32, speculate=False))

    def run(masks: Sequence[AppliedMask | None]) -> None:
        prompts = make_prompts(scale, scale.requests, scale.prompt, next(seeds))
        answer(engine, prompts, masks, scale.answer)

    def generate() -> None:
        ids = torch.tensor(make_prompts(scale, scale.requests, scale.prompt, next(seeds)), device=world.base.device)
        with world.detach():
            world.base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    config = GenerationConfig(
        max_new_tokens=scale.answer, min_new_tokens=scale.answer, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    cases = {"generate": generate, "base": partial(run, [None]), "personas": partial(run, personas)}
    times = world.clock.alternate(cases, scale.rounds)
    engine.stop()
    world.base.model.set_attn_implementation(attention.NAME)
    label = f"{scale.requests} requests of {scale.prompt} + {scale.answer} tokens"
    for name, seconds in times.items():
        what = {"generate": "`generate`, base", "base": "engine, base"}.get(name, f"engine, {scale.adapters} personas")
        yield Figure(f"{what}, {label}", scale.requests * scale.answer / seconds, "tokens/s")
    yield Figure(f"engine / `generate`, base, {label}", times["generate"] / times["base"], "x")
    what = f"engine of {scale.adapters} personas / `generate` of the base"
    yield Figure(f"{what}, {label}", times["generate"] / times["personas"], "x")


def measure_prefill(world: World) -> Iterator[Figure]:
    """A long prompt, as the engine divides it by default, to its first token."""
    scale, seeds = world.scale, counter()
    engine = Engine(world.base, EngineConfig(max_running=1, cache_bytes=2**33, speculate=False))

    def run(masks: Sequence[AppliedMask | None]) -> None:
        answer(engine, make_prompts(scale, 1, scale.prefill, next(seeds)), masks, 1)

    forms = {"base": [None], SPARSE: world.find_personas(SPARSE, 1), BITMAP: world.find_personas(BITMAP, 1)}
    times = world.clock.alternate({name: partial(run, masks) for name, masks in forms.items()}, scale.rounds)
    engine.stop()
    world.base.model.set_attn_implementation(attention.NAME)
    yield Figure(f"prefill of {scale.prefill} positions, base", scale.prefill / times["base"], "tokens/s")
    for form in (SPARSE, BITMAP):
        ratio = times[form] / times["base"]
        yield Figure(f"prefill of {scale.prefill} positions, 1 persona, {form} / base", ratio, "x")


def measure_loads(world: World, form: str) -> Iterator[Figure]:
    """From host memory to ready for use, alone and on another thread while steps run."""
    mask, rows = world.find_mask(form), min(DECODING, max(world.scale.rows))
    run = world.steps.settle(rows, [None])
    quiet = [world.clock.time(run) for _ in range(world.scale.steps * world.scale.repeats)]
    label = f"{form}, {world.fit(form, mask).nbytes / 1e6:.0f} MB"
    pinned = HostCache(2**35).keep(mask)  # one contiguous mapping, page-locked beside a CUDA device
    for memory, host_mask in (("pageable", mask), ("pinned", pinned)):
        load = partial(world.fit, form, host_mask)
        alone = min(world.clock.time(load) for _ in range(3))
        busy, loads = overlap(world, run, load)
        case = f"cold load of a persona, {label}, from {memory} memory"
        yield Figure(case, alone * 1e3, "ms")
        yield Figure(f"{case}, while {rows} rows decode / alone", min(loads) / alone, "x")
        for percentile in (50, 95):
            ratio = float(np.percentile(busy, percentile) / np.median(quiet))
            yield Figure(f"step of {rows} rows during a {case}, percentile {percentile} / median without", ratio, "x")


def overlap(world: World, run: Callable[[], object], load: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of each of three loads on another thread meanwhile."""
    loads: list[float] = []

    def load_often() -> None:
        for _ in range(3):
            started = time.perf_counter()
            load()
            loads.append(time.perf_counter() - started)

    thread = threading.Thread(target=load_often)
    thread.start()
    steps = [world.clock.time(run)]
    while thread.is_alive():
        steps.append(world.clock.time(run))
    thread.join()
    return steps, loads


def measure_rest(world: World) -> Iterator[Figure]:
    """A bitmap at half strength, and the host's work when all rows change their personas."""
    rows = min(DECODING, max(world.scale.rows))
    (bits,) = world.find_personas(BITMAP, 1)
    assert bits
    cases = {"base": [None], "soft": [replace(bits, gamma=0.5)]}
    steps = {name: partial(world.steps.settle, rows, masks) for name, masks in cases.items()}
    times = world.clock.compare(steps, world.scale)
    yield Figure(f"step, {rows} rows, 1 personas, {BITMAP} at gamma 0.5 / base", times["soft"] / times["base"], "x")
    seconds = world.steps.measure_switch(rows, world.find_personas(SPARSE, rows))
    yield Figure(f"switch of {rows} rows to other personas, host work", seconds * 1e6, "us")


def measure_peft(world: World) -> Iterator[Figure]:
    """A decode step of PEFT's mixed batch beside one of as many personas. The model is PEFT's afterwards."""
    from peft import LoraConfig, get_peft_model

    scale, rows = world.scale, min(DECODING, max(world.scale.rows))
    masks = world.find_personas(SPARSE, scale.adapters)
    ours = world.clock.compare({"step": partial(world.steps.settle, rows, masks)}, scale)["step"]
    del masks
    world.drop_personas()
    with world.detach():
        names = [f"p{number}" for number in range(scale.adapters)]
        config = LoraConfig(r=16, target_modules="all-linear")
        with torch.inference_mode(False):
            model = get_peft_model(world.base.model, config, adapter_name=names[0])
            for name in names[1:]:
                model.add_adapter(name, config)
            model.eval()
        adapters = [names[row % len(names)] for row in range(rows)]
        cache = DynamicCache(config=world.base.model.config)
        ids = torch.full((rows, scale.context), 5, device=world.base.device)
        model(ids, past_key_values=cache, adapter_names=adapters)

        def step() -> None:
            model(ids[:, :1], past_key_values=cache, adapter_names=adapters)
            cache.crop(-1)

        theirs = world.clock.compare({"step": lambda: step}, scale)["step"]
    yield Figure(f"tokens/s, {rows} rows, personas / PEFT with {scale.adapters} adapters", theirs / ours, "x", ">= 5")


def answer(engine: Engine, prompts: Sequence[list[int]], masks: Sequence[AppliedMask | None], new: int) -> None:
    """So many tokens for each prompt. Raises `RuntimeError` if a request ends with an error."""
    answers = engine.generate(
        Request(prompt, new, lambda _: None, masks[place % len(masks)], sampling=GREEDY)
        for place, prompt in enumerate(prompts)
    )
    if short := [len(tokens) for tokens in answers if len(tokens) != new]:
        raise RuntimeError(f"{len(short)} of {len(answers)} answers end early; one after {short[0]} of {new} tokens")


def make_prompts(scale: Scale, count: int, length: int, seed: int) -> list[list[int]]:
    """Random ones, so that none finds another's prefix in the cache."""
    prompts: list[list[int]] = np.random.default_rng(seed).integers(scale.vocabulary, size=(count, length)).tolist()
    return prompts


if __name__ == "__main__":
    main()
