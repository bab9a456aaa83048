"""A build's time for statistics and its peak memory, relative to forward passes over the same batches.

`python -m benchmarks.build --json [--quick]`. A random Llama of about 100 M parameters; every measurement is a process
of its own, and memory is that process' peak (resident) against one that only loads the model and runs the forward
passes. Time is CPU time on one thread, against the mean of the forward passes before and after it in the same process.
Hidden states lie in a folder, as `masquerade build` keeps them.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks._methods import calibrate
from benchmarks._report import Figure, arguments, report
from benchmarks._world import VOCABULARY, write_base
from masquerade.evaluate.dataset import Encoded, batches
from masquerade.model import Base, load
from masquerade.pruning.recipe import Recipe
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import Role

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12}
QUICK = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
BATCH = 512  # padded tokens of a micro-batch
RHOS = {"contrastive-wanda": 0.1, "sparsegpt": 0.5, "attribution": 0.003, "attribution-fisher": 0.003}
BOUNDS = {"statistics": ("<= 1.5", "<= 1.15"), "attribution": ("<= 4", "<= 1.6")}


def main() -> None:
    parser = arguments(__doc__, quick="a smaller model and less text; within a minute")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SCORE", "EXAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, score, examples = options.one
        print(json.dumps(run(Path(folder), score, int(examples))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), QUICK if options.quick else SHAPE)
        figures = list(measure(Path(folder), examples=32 if options.quick else 24, repeats=1))
    report("build", figures, options.json)


def measure(folder: Path, examples: int, repeats: int) -> Iterator[Figure]:
    found: dict[str, dict[str, float]] = {}
    for _ in range(repeats):
        for score in ("forward", *RHOS):
            one = measure_one(folder, score, examples)
            known = found.setdefault(score, one)
            known |= {key: min(known[key], one[key]) for key in ("seconds", "ratio", "scoring", "bytes")}
    forward = found.pop("forward")
    yield Figure("parameters", forward["parameters"] / 1e6, "M")
    yield Figure("weights", forward["weights"] / 2**20, "MiB")
    yield Figure("forward passes", forward["seconds"], "CPU-s")
    for score, one in found.items():
        kind = "statistics" if score == "contrastive-wanda" else "attribution" if score == "attribution" else ""
        time_bound, memory_bound = BOUNDS.get(kind, (None, None))
        yield Figure(f"{score}, statistics / forward passes", one["ratio"], "x", time_bound)
        yield Figure(f"{score}, scores and selection", one["scoring"], "CPU-s")
        yield Figure(f"{score}, peak / forward passes'", one["bytes"] / forward["bytes"], "x", memory_bound)


def measure_one(folder: Path, score: str, examples: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.build", "--one", str(folder), score, str(examples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run(folder: Path, score: str, examples: int) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    base = load(str(folder), device="cpu")
    roles: tuple[Role, ...] = ("own", "contrast", "neutral")
    examples_by_role = {role: make_examples(seed, examples) for seed, role in enumerate(roles)}
    forward = [pass_forward(base, examples_by_role)]
    started, scoring = time.process_time(), 0.0
    if score != "forward":
        with tempfile.TemporaryDirectory() as scratch:
            scoring = select(base, score, examples_by_role, Scratch(Path(scratch)))
    spent = time.process_time() - started - scoring
    forward.append(pass_forward(base, examples_by_role))
    return {
        "seconds": min(forward),
        "ratio": 2 * spent / sum(forward),
        "scoring": scoring,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "weights": sum(p.nbytes for p in base.model.parameters()),
    }


def make_examples(seed: int, count: int) -> list[Encoded]:
    rng = random.Random(seed)

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(4, VOCABULARY) for _ in range(rng.randint(least, most)))

    return [Encoded(words(8, 24), words(24, 72)) for _ in range(count)]


@torch.no_grad()
def pass_forward(base: Base, examples_by_role: Mapping[Role, list[Encoded]]) -> float:
    """CPU seconds of the model's forward passes over both sides' text, in the batches of the statistics."""
    started = time.process_time()
    for text in (examples_by_role["own"], examples_by_role["contrast"]):
        for batch in batches(text, base.device, BATCH):
            base.model(input_ids=batch.ids, use_cache=False)
    return time.process_time() - started


def select(base: Base, score: str, examples_by_role: Mapping[Role, list[Encoded]], scratch: Scratch) -> float:
    """Statistics, scores and selection for both opposites, as a build does them; CPU seconds of the last two."""
    spent = 0.0

    @contextmanager
    def scoring() -> Iterator[None]:
        nonlocal spent
        started = time.process_time()
        yield
        spent += time.process_time() - started

    plans = [Recipe(score=score, rho=RHOS[score]).plan(contrast=True)]
    calibrate(base, plans, examples_by_role, scratch, BATCH, scoring)
    return spent


if __name__ == "__main__":
    main()
