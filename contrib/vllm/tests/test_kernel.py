"""The operator, on a CPU and as a Triton kernel in Triton's interpreter, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_masquerade.kernel import subtract_pruned, subtract_triton

ROWS, OUT, IN, SLOTS, ROOM = 9, 70, 48, 3, 400


def make_case(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Inputs of the operator: rows of every slot and of the base, one slot empty, lists that end before the room."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, IN, generator=generator).to(dtype)
    y = torch.randn(ROWS, OUT, generator=generator).to(dtype)
    slots = torch.tensor([0, -1, 2, 2, 1, -1, 0, 2, -1, 77, -5])  # longer than the rows, as vLLM's is
    bounds = torch.zeros(SLOTS, OUT + 1, dtype=torch.int32)
    columns = torch.full((SLOTS, ROOM), 1 << 30, dtype=torch.int32)
    values = torch.full((SLOTS, ROOM), torch.nan).to(dtype)
    for slot in (0, 2):
        pruned = (torch.rand(OUT, IN, generator=generator) < 0.1).nonzero()
        bounds[slot, 1:] = torch.bincount(pruned[:, 0], minlength=OUT).cumsum(0)
        columns[slot, : len(pruned)] = pruned[:, 1]
        values[slot, : len(pruned)] = torch.randn(len(pruned), generator=generator).to(dtype)
    return y, x, slots, bounds, columns, values, torch.tensor([1.0, 1.0, 0.25])


def expect(y: Tensor, x: Tensor, slots: Tensor, bounds: Tensor, columns: Tensor, values: Tensor, s: Tensor) -> Tensor:
    """The same in float64, with dense weights."""
    wanted = y.double()
    for row, slot in enumerate(slots[: len(y)].tolist()):
        if slot >= 0:
            dense, count = torch.zeros(OUT, IN, dtype=torch.float64), int(bounds[slot, -1])
            outputs = torch.repeat_interleave(torch.arange(OUT), bounds[slot].diff())
            dense[outputs, columns[slot, :count].long()] = values[slot, :count].double()
            wanted[row] -= float(s[slot]) * (dense @ x[row].double())
    return wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_equals_float64(dtype: torch.dtype) -> None:
    case = make_case(dtype)
    wanted, base = expect(*case), case[0].clone()
    subtract_pruned(*case)
    torch.testing.assert_close(case[0].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(case[0][[1, 4, 5, 8]], base[[1, 4, 5, 8]])  # the base, and the empty slot


def test_torch_compiles_it_into_one_graph() -> None:
    case = make_case(torch.float32)

    def double(y: Tensor, *rest: Tensor) -> Tensor:
        twice = y * 2
        subtract_pruned(twice, *rest)
        return twice

    wanted = double(*case)
    assert torch.equal(torch.compile(double, backend="aot_eager", fullgraph=True)(*case), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_triton_kernel_equals_float64(dtype: str) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(  # the interpreter is chosen when triton is imported
        [sys.executable, __file__, dtype],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, untouched = json.loads(done.stdout.splitlines()[-1])
    assert error < (1e-5 if dtype == "float32" else 0.05)
    assert untouched


if __name__ == "__main__":
    given = make_case(getattr(torch, sys.argv[1]))
    wanted, before = expect(*given), given[0].clone()
    subtract_triton(*given)
    same = torch.equal(given[0][[1, 4, 5, 8]], before[[1, 4, 5, 8]])
    print(json.dumps([(given[0].double() - wanted).abs().max().item(), same]))
