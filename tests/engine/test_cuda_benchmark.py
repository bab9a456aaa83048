"""The benchmark of CUDA devices, on a tiny model and whatever device there is: its parts fit together."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from masquerade.model import manager

pytest.importorskip("triton")
from benchmarks import gpu
from benchmarks._device import BITMAP, SPARSE
from benchmarks._report import Figure, LeftOut, follow
from masquerade.engine.cuda import paged

# What Python runs when it starts: these packages are not found.
HIDE = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
hidden = {"fastapi", "pydantic", "sqlalchemy", "starlette", "typer", "uvicorn"}
found = lambda _, name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)
PathFinder.find_spec = classmethod(found)
"""

TINY = gpu.Scale(
    hidden=64,
    inner=64,
    layers=1,
    heads=4,
    kv_heads=2,
    vocabulary=64,
    rows=(2,),
    context=20,
    personas=(2, 3),
    forms=(SPARSE, BITMAP),
    adapters=2,
    prefill=24,
    requests=2,
    prompt=3,
    answer=2,
    rounds=1,
    steps=1,
    repeats=1,
    dtype=torch.float32,
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels serve whatever device there is."""
    monkeypatch.setattr(manager, "serves", lambda module: type(module) is nn.Linear)
    monkeypatch.setattr(paged, "_PROGRAMS", 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.usefixtures("_kernels")
def test_every_figure_is_measured() -> None:
    results = list(gpu.measure(TINY, DEVICE, math.inf))
    assert [result.name for result in results if isinstance(result, LeftOut)] == ["vLLM with LoRA"]
    figures = {figure.name: figure for figure in results if isinstance(figure, Figure)}
    assert len(figures) == len(results) - 1
    assert all(math.isfinite(figure.value) for figure in figures.values())
    for form in TINY.forms:
        assert f"step, 2 rows, 2 personas, {form} / base" in figures
        assert f"step, 2 rows, 3 personas, {form} / base" not in figures
    assert figures["step of 1 row, base / reading its bytes once"].reach == "<= 1.15"
    assert figures["step, 2 rows of the base with personas enabled / a plain model"].reach == "<= 1.02"


@pytest.mark.usefixtures("_kernels")
def test_rows_that_fail_or_have_no_time_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[Figure]:
        raise RuntimeError("out of memory")

    def list_rows(_: object) -> Iterator[gpu.Row]:
        yield gpu.Row("one", lambda: iter([Figure("first", 1.0, "x")]))
        yield gpu.Row("two", fail)
        monkeypatch.setattr(gpu.time, "monotonic", lambda: math.inf)
        yield gpu.Row("three", lambda: pytest.fail("no time is left"))

    monkeypatch.setattr(gpu, "list_rows", list_rows)
    *found, _ = gpu.measure(TINY, DEVICE, 1e12)
    failed, late = LeftOut("two", "RuntimeError: out of memory"), LeftOut("three", "no time was left")
    assert found == [Figure("first", 1.0, "x"), failed, late]


def test_figures_are_in_the_file_before_the_next_one_is_measured(tmp_path: Path) -> None:
    out, lines = tmp_path / "figures.jsonl", []

    def measure() -> Iterator[Figure | LeftOut]:
        for result in (Figure("a", 1.0, "x", "<= 2"), LeftOut("b", "no time")):
            lines.append(out.read_text().splitlines())
            yield result

    follow("gpu", measure(), out)
    run, *rows = map(json.loads, out.read_text().splitlines())
    assert [len(known) for known in lines] == [1, 2]
    assert run["benchmark"] == "gpu"
    assert run["hardware"]
    assert rows[0] == {"name": "a", "value": 1.0, "unit": "x", "reach": "<= 2", "ok": True}
    assert rows[1] == {"name": "b", "why": "no time"}


def test_the_tests_run_without_the_packages_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A device's Python need not have them."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    gpu.run_tests("-k", "beyond_a_row")
    assert "1 passed" in capfd.readouterr().err


def test_a_failing_test_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match="nothing was measured"):
        gpu.run_tests()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--json"])
    gpu.main()
    told = capsys.readouterr()
    assert json.loads(told.out)["figures"] == []
    assert "no CUDA device" in told.err
