"""The benchmark of CUDA devices, on a tiny model and whatever device there is: its parts fit together."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from masquerade.model import manager

pytest.importorskip("triton")
from benchmarks import gpu
from masquerade.engine.cuda import paged

TINY = gpu.Scale(
    hidden=64,
    inner=64,
    layers=1,
    heads=4,
    kv_heads=2,
    vocabulary=64,
    rows=2,
    context=20,
    personas=(1, 2),
    adapters=2,
    steps=1,
    repeats=1,
    dtype=torch.float32,
)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_every_figure_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "serves", lambda module: type(module) is nn.Linear)
    monkeypatch.setattr(paged, "_PROGRAMS", 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {figure.name: figure for figure in gpu.measure(TINY, device)}
    assert len(figures) >= 10
    assert all(figure.value == figure.value for figure in figures.values())
    assert figures["step, 1 sparse personas of 0.3% / base"].reach == "<= 1.05"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--json"])
    gpu.main()
    told = capsys.readouterr()
    assert json.loads(told.out)["figures"] == []
    assert "no CUDA device" in told.err
