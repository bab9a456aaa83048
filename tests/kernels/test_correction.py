"""Both backends against the formula in float64, and what they promise about rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from maskstore import encode
from masquerade.kernels import BACKENDS, Assignment, RowwiseCorrection, SparseCorrection, correct, footprint

ANYWHERE = [name for name in BACKENDS if not name.startswith("cuda")]  # the others are in test_triton.py
SHAPES = [(64, 64), (40, 100), (3, 17), (96, 130)]  # the last three have ragged columns
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def make_linear(out: int, columns: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(out * columns)
    return nn.Linear(columns, out, bias=False).to(dtype).requires_grad_(False)


def prune(out: int, columns: int, share: float) -> np.ndarray:
    return np.random.default_rng(7).random((out, columns)) < share


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (dtype, backend)
        for dtype in TOLERANCE
        for backend in ANYWHERE
        if backend != "list" or dtype in (torch.float32, torch.bfloat16)  # the dtypes of the library
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.0, 0.003, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_the_formula(shape: tuple[int, int], share: float, dtype: torch.dtype, backend: str) -> None:
    linear, pruned = make_linear(*shape, dtype), prune(*shape, share)
    x = torch.randn(5, shape[1]).to(dtype)
    expected = x.double() @ (linear.weight.double() * torch.from_numpy(pruned)).T
    found = correct(linear, encode(pruned), backend)(x)
    scale = x.double().abs() @ linear.weight.double().abs().T
    assert ((found.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("backend", ANYWHERE)
def test_pruned_weights_are_skipped_not_multiplied(backend: str) -> None:
    """What is kept never enters the correction, even if it is not a number."""
    linear, pruned = make_linear(8, 16, torch.float32), prune(8, 16, 0.5)
    linear.weight.data[torch.from_numpy(~pruned)] = float("inf")
    assert correct(linear, encode(pruned), backend)(torch.randn(3, 16)).isfinite().all()


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_a_sparse_row_depends_on_its_neighbours_by_rounding_at_most(rows: int) -> None:
    linear, pruned = make_linear(96, 130, torch.float32), prune(96, 130, 0.05)
    correction = correct(linear, encode(pruned), "sparse")
    x = torch.randn(rows, 130)
    together = correction(x)
    alone = torch.cat([correction(x[row : row + 1]) for row in range(rows)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float64, ("sparse", "sparse", "reference")),  # what the native kernels do not serve
        (torch.float32, ("list", "bits", "bits")),
        (torch.bfloat16, ("list", "bits", "bits")),
    ],
    ids=str,
)
def test_linear_and_density_choose_the_backend(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    linear = make_linear(64, 512, dtype)
    for share, name in zip((0.003, 0.04, 0.5), names, strict=True):
        target = encode(prune(64, 512, share))
        found = correct(linear, target)
        assert isinstance(found, BACKENDS[name])
        assert found.nbytes == footprint(linear, target.kind, target.pruned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference", "sparse", "cuda-bits", "cuda-list"])
def test_product_on_a_gpu_equals_the_cpu(backend: str) -> None:
    linear, pruned = make_linear(96, 130, torch.float32), prune(96, 130, 0.05)
    x = torch.randn(9, 130)
    expected = correct(linear, encode(pruned), "reference")(x)
    found = correct(linear.to("cuda"), encode(pruned), backend)(x.to("cuda"))
    assert torch.allclose(found.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_with_a_matrix_each_equal_the_formula(dtype: torch.dtype) -> None:
    """Several masks, several rows of one of them, rows of nobody between them, in one gather and one scatter."""
    linear = make_linear(40, 100, dtype)
    pruned = [np.random.default_rng(seed).random((40, 100)) < share for seed, share in enumerate((0.003, 0.1, 0.0))]
    rows, strengths = [[5], [0, 2, 3], [6]], [[1.0], [0.7, 0.2, 1.0], [1.0]]
    x, y = torch.randn(9, 100).to(dtype), torch.randn(9, 40).to(dtype)
    expected = y.double()
    assignments = []
    for mask, at, by in zip(pruned, rows, strengths, strict=True):
        gone = linear.weight.double() * torch.from_numpy(mask)
        expected[at] -= torch.tensor(by).double().unsqueeze(1) * (x[at].double() @ gone.T)
        correction = SparseCorrection(linear, encode(mask))
        assignments.append(Assignment(correction, torch.tensor(at), torch.tensor(by).unsqueeze(1)))
    RowwiseCorrection(assignments).subtract(x, y)
    assert torch.allclose(y.double(), expected, atol=1e-5 if dtype in (torch.float32, torch.float64) else 3e-2)
