"""The speed of packing, combining, writing and verifying masks, each against a peer interleaved in the same run.

`python -m benchmarks.maskstore --json [--quick]`. A value is a ratio of speeds (own over peer) where the unit is "x".
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks._report import Figure, report
from maskstore import (
    BaseRef,
    Bitmap,
    Mask,
    MaskInfo,
    MaskReader,
    MaskWriter,
    Registry,
    Target,
    algebra,
    bits,
    encode,
    read_mask,
    write_mask,
)
from maskstore.format import write_file

BASE = BaseRef("8b" * 32, "8B-shaped")
INFO = MaskInfo("bench", "random", created_at="2026-01-01T00:00:00+00:00")
LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SMALL = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
LAYERS = 32
SHAPE = (4096, 14336)


def race(own: Callable[[], object], peer: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best seconds of both, interleaved."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for times, work in zip(seconds, (own, peer), strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return min(seconds[0][1:] or seconds[0]), min(seconds[1][1:] or seconds[1])


def versus(name: str, peer: str, nbytes: int, seconds: tuple[float, float], reach: float | None) -> Iterator[Figure]:
    own, other = seconds
    yield Figure(name, nbytes / own / 1e9, "GB/s")
    yield Figure(f"{peer} beside {name}", nbytes / other / 1e9, "GB/s")
    yield Figure(f"{name} / {peer}", other / own, "x", f">= {reach}" if reach else None)


def measure_bits(repeats: int) -> Iterator[Figure]:
    """Packing, counting and CSR on one 14336-wide module; bytes are those of the boolean array or of the bitmap."""
    rng = np.random.default_rng(0)
    dense, thin = rng.random(SHAPE, np.float32) < 0.5, rng.random(SHAPE, np.float32) < 0.003
    packed, spare = bits.pack(dense), np.empty(dense.size // 8, np.uint8)
    rows, cols = bits.to_csr(thin)

    def copy() -> None:
        np.copyto(spare, packed.reshape(-1))

    def copy_bools() -> None:
        np.copyto(thin_copy, thin)

    thin_copy = thin.copy()
    yield from versus(
        "pack",
        "np.packbits",
        dense.nbytes,
        race(lambda: bits.pack(dense), lambda: np.packbits(dense, 1, "little"), repeats),
        0.8,
    )
    unpack = race(lambda: bits.unpack(packed, SHAPE[1]), lambda: np.unpackbits(packed, 1, None, "little"), repeats)
    yield from versus("unpack", "np.unpackbits", dense.nbytes, unpack, 0.8)
    yield from versus("popcount", "memcpy", packed.nbytes, race(lambda: bits.popcount(packed), copy, repeats), None)
    yield from versus("to CSR", "memcpy", thin.nbytes, race(lambda: bits.to_csr(thin), copy_bools, repeats), None)
    csr = race(lambda: bits.from_csr(rows, cols, SHAPE[1]), copy_bools, repeats)
    yield from versus("from CSR", "memcpy", thin.nbytes, csr, None)
    yield from versus("encode", "memcpy", thin.nbytes, race(lambda: encode(thin), copy_bools, repeats), None)


def measure_algebra(repeats: int) -> Iterator[Figure]:
    """Two half-dense bitmaps, then two masks of 0.3 %."""
    rng = np.random.default_rng(1)
    width = bits.stride(SHAPE[1])
    one, two = (Bitmap(rng.integers(0, 256, (SHAPE[0], width), np.uint8), SHAPE[1]) for _ in range(2))
    spare = np.empty_like(one.keep)

    def copy() -> None:
        np.copyto(spare, one.keep)

    for name, operation in [("a | b", algebra.union), ("a & b", algebra.intersection), ("a - b", algebra.difference)]:
        seconds = race(lambda operation=operation: operation(one, two), copy, repeats)
        yield from versus(name, "memcpy", one.nbytes, seconds, 0.3 if name == "a | b" else None)
    thin, other = (encode(rng.random(SHAPE, np.float32) < 0.003) for _ in range(2))
    own, _ = race(lambda: algebra.union(thin, other), copy, repeats)
    yield Figure("a | b, sparse 0.3 %", (thin.pruned + other.pruned) / own / 1e6, "million places/s")


def modules(layers: int) -> Iterator[tuple[str, Target]]:
    """An 8B-shaped bitmap mask, made on the fly."""
    rng = np.random.default_rng(2)
    for layer in range(layers):
        for name, (out, columns) in LINEARS.items():
            keep = np.frombuffer(rng.bytes(out * bits.stride(columns)), np.uint8).reshape(out, -1)
            yield f"model.layers.{layer}.{name}", Bitmap(keep, columns)


def write(path: Path, layers: int) -> None:
    with MaskWriter(path, BASE, INFO) as writer:
        for name, target in modules(layers):
            writer.add(name, target)


def read(path: Path, _: int) -> None:
    """Open, verify and visit every module."""
    with MaskReader(path) as reader:
        for _, target in reader:
            target.pruned  # noqa: B018 - the count touches every page


def verify(path: Path, _: int) -> None:
    with MaskReader(path) as reader:
        reader.check()


STEPS = {"write": write, "read": read, "verify": verify}


def peak(step: str, path: Path, layers: int) -> float:
    """Peak MB that a step adds to the memory of a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.maskstore",
        "--step",
        step,
        "--path",
        str(path),
        "--layers",
        str(layers),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident(field: str) -> int:
    """A line of /proc/self/status in kB."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)
    )


def run_step(step: str, path: Path, layers: int) -> float:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    STEPS[step](path, layers)
    return (resident("VmHWM") - before) * 1024 / 1e6


def measure_files(folder: Path, layers: int, repeats: int) -> Iterator[Figure]:
    """A large file: memory of writing and reading, speed of verifying against sha256sum on the same file."""
    path = folder / "large.safetensors"
    shape = f"8B-shaped bitmap, {layers} of {LAYERS} layers"
    yield Figure(f"peak memory over baseline, stream write ({shape})", peak("write", path, layers), "MB", "<= 64")
    yield Figure(f"peak memory over baseline, stream read ({shape})", peak("read", path, layers), "MB", "<= 64")
    size = path.stat().st_size
    yield Figure("file", size / 1e6, "MB")
    seconds = race(
        lambda: verify(path, layers), lambda: subprocess.run(["sha256sum", path], check=True, stdout=-3), repeats
    )
    yield from versus("open + verify", "sha256sum", size, seconds, 0.5)
    started = time.perf_counter()
    write(path, layers)
    yield Figure("stream write with random bits", size / (time.perf_counter() - started) / 1e9, "GB/s")


def measure_gaps(folder: Path, repeats: int) -> Iterator[Figure]:
    """A mask of 0.08 % of every Linear of SmolLM2-135M, stored as gaps and as rows and columns."""
    rng = np.random.default_rng(3)
    targets = {
        f"model.layers.{layer}.{name}": encode(rng.random(shape, np.float32) < 0.0008)
        for layer in range(30)
        for name, shape in SMALL.items()
    }
    mask = Mask(BASE, targets, INFO)
    gaps, rows = folder / "gaps", folder / "rows"
    write_mask(mask, gaps)
    write_file(rows, mask, {name: target.tensors for name, target in targets.items()})
    sizes = gaps.stat().st_size, rows.stat().st_size
    yield Figure(f"file of {mask.pruned} pruned weights in {len(targets)} modules", sizes[0] / 1e3, "kB", "<= 250")
    yield Figure("the same as rows and columns", sizes[1] / 1e3, "kB")
    seconds = race(lambda: read_mask(gaps), lambda: read_mask(rows), 2 * repeats)
    yield Figure("read and verify it", seconds[0] * 1e3, "ms")
    yield Figure("the same as rows and columns, to read", seconds[1] * 1e3, "ms")


def measure_registry(folder: Path, repeats: int) -> Iterator[Figure]:
    registry = Registry(folder)
    with MaskWriter(folder / "x", BASE, INFO) as writer:
        writer.add("x", encode(np.eye(64, dtype=bool)))
    path = registry.store.path(writer.digest)
    path.parent.mkdir(parents=True)
    os.replace(folder / "x", path)
    registry.publish("bench", writer.digest)
    times = []
    for _ in range(20 * repeats):
        started = time.perf_counter()
        registry.resolve("bench")
        times.append(time.perf_counter() - started)
    yield Figure("resolve a name", float(np.median(times)) * 1e6, "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    if options.step:
        print(run_step(options.step, options.path, options.layers))
        return
    repeats, layers = (15, 4) if options.quick else (25, options.layers)
    figures = [*measure_bits(repeats), *measure_algebra(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        figures += measure_files(Path(folder), layers, 2 if options.quick else 3)
        figures += measure_gaps(Path(folder), repeats)
        figures += measure_registry(Path(folder), repeats)
    report("maskstore", figures, options.json)


if __name__ == "__main__":
    main()
