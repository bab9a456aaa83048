"""Loading a model beside reading its files: seconds and peak memory, for a folder and for a GGUF.

`python -m benchmarks.load --json [--quick]`. The models are SmolLM2 from its GGUF (Q4_1), the bf16 folder that is saved
from it, and, without `--quick`, a random Llama of 0.5 billion parameters in bf16. Every measurement is a process of its
own that has loaded the demo before, so that modules are imported; it reads the files into new memory, then loads the
model and touches each page of its weights, because a folder's may stay mapped. Processes of all cases take turns; the
figures are medians, ratios are medians of each process's ratio. One thread; files are in the page cache.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks._world import load_smollm2, write_base
from masquerade import sources
from masquerade.model import dequantized, load
from masquerade.sources import find_model

ROUNDS, QUICK_ROUNDS = 5, 3
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
MIB = 2**20
PAGE = 4096
PARTS: Mapping[str, tuple[tuple[Any, str], ...]] = {  # of a load: functions that are timed within it
    "fingerprint": ((sources, "fingerprint"), (sources, "fingerprint_tensors")),
    "tokenizer": ((AutoTokenizer, "from_pretrained"), (dequantized, "read_tokenizer")),
}
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """A model, and the dtype that it is loaded in."""

    name: str
    model: str
    dtype: str


def main() -> None:
    options = arguments(__doc__, "three rounds, and SmolLM2 alone").parse_args()
    logging.disable_progress_bar()
    base = load_smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        folder, large = Path(scratch, "smollm2"), Path(scratch, "large")
        for part in (base.model, base.tokenizer):
            part.save_pretrained(folder)
        cases = [
            Case("SmolLM2, bf16 folder as bf16", str(folder), "bfloat16"),
            Case("SmolLM2, bf16 folder as fp32", str(folder), "float32"),
            Case("SmolLM2, Q4_1 GGUF as bf16", "smollm2", "bfloat16"),
        ]
        if not options.quick:
            large.mkdir()
            write_base(large, LARGE, torch.bfloat16)
            cases.append(Case("0.5 B, bf16 folder as bf16", str(large), "bfloat16"))
        found = measure(cases, QUICK_ROUNDS if options.quick else ROUNDS)
    report("load", [figure for case in cases for figure in describe(case.name, found[case.name])], options.json)


def measure(cases: list[Case], rounds: int) -> Mapping[str, list[dict[str, float]]]:
    """The measurements of each case, in turn."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for case in cases:
            code = f"from benchmarks.load import measure_once; measure_once({case.model!r}, {case.dtype!r})"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            found[case.name].append(json.loads(done.stdout))
    return found


def measure_once(model: str, dtype: str) -> None:
    """Print seconds and bytes of one load as JSON."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    load("demo", device="cpu")
    files = find_model(model)
    paths = [files.path] if files.is_gguf else sorted(files.path.glob("*.safetensors"))
    costs = {"reading": Cost()}
    costs["reading"].add(lambda: [path.read_bytes() for path in paths])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, mapped = resident("VmRSS"), resident("RssFile")
    for name, places in PARTS.items():
        costs[name] = Cost()
        for owner, attribute in places:
            setattr(owner, attribute, partial(costs[name].add, getattr(owner, attribute)))
    costs["loading"] = Cost()
    loaded = costs["loading"].add(load_whole, model, dtype)
    peak, mapped = resident("VmHWM") - before, resident("RssFile") - mapped
    weights = [weight.nbytes for weight in loaded.parameters()]
    costs["filling"] = Cost()
    costs["filling"].add(lambda: [torch.zeros(nbytes, dtype=torch.uint8) for nbytes in weights])
    found = {f"{name} {kind}": value for name, cost in costs.items() for kind, value in asdict(cost).items()}
    print(json.dumps(found | {"peak": peak, "mapped": mapped, "weights": sum(weights)}))


@dataclass
class Cost:
    """Seconds that something took, and bytes that it left in memory."""

    cpu: float = 0
    wall: float = 0
    memory: int = 0

    def add(self, work: Callable[..., T], *arguments: Any, **more: Any) -> T:
        """Run the work and count it."""
        memory, wall, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        done = work(*arguments, **more)
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        self.memory += resident("VmRSS") - memory
        return done


def load_whole(model: str, dtype: str) -> Any:
    """The model with weights that are in memory, mapped or not."""
    loaded = load(model, device="cpu", dtype=dtype).model
    for weight in loaded.parameters():
        weight.detach().flatten().view(torch.uint8)[::PAGE].sum()
    return loaded


def resident(key: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def describe(name: str, runs: list[dict[str, float]]) -> Iterator[Figure]:
    for what in ("reading", "filling", "loading", *PARTS):
        for kind in ("cpu", "wall"):
            yield Figure(f"{name}: {what}, {kind}", median(run[f"{what} {kind}"] for run in runs), "s")
    for kind in ("cpu", "wall"):
        ratios = [(run[f"loading {kind}"] - run[f"tokenizer {kind}"]) / run[f"reading {kind}"] for run in runs]
        yield Figure(f"{name}: loading without the tokenizer / reading, {kind}", median(ratios), "x", "<= 1.1")
    for what in ("weights", "peak", "mapped", "tokenizer memory"):
        yield Figure(f"{name}: {what}", median(run[what] for run in runs) / MIB, "MiB")
    ratios = [(run["peak"] - run["tokenizer memory"]) / run["weights"] for run in runs]
    yield Figure(f"{name}: peak without the tokenizer / weights", median(ratios), "x", "<= 1.1")


if __name__ == "__main__":
    main()
