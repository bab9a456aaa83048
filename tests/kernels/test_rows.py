"""What layers do between products: values and gradients are those of float64, with every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from masquerade.kernels import add_gains, attend, multiply_gate, native, normalize, rotate, serves_rows
from masquerade.kernels.native import ISAS, find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="needs the native kernels")
SUPPORTED = library.isas if (library := find_library()) else []
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}  # of the largest value
ROWS, LENGTH, SIZE = 3, 5, 24


@pytest.fixture(params=SUPPORTED)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set that the library uses."""
    monkeypatch.setattr(native.require_library(), "fastest", ISAS.index(request.param))
    return str(request.param)


@pytest.fixture(params=EPSILON, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of all elements."""
    found: torch.dtype = request.param
    return found


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare values, and the gradients of all inputs, with those of a function of float64."""
    dtype = inputs[0].dtype
    given = [one.clone().requires_grad_(True) for one in inputs]
    exact = [one.double().requires_grad_(True) for one in inputs]
    y, oracle = found(*given), expected(*exact)
    assert (y.dtype, y.shape) == (dtype, oracle.shape)
    above = draw(*y.shape, dtype=dtype, seed=9)
    gradients = torch.autograd.grad(y, given, above), torch.autograd.grad(oracle, exact, above.double())
    for one, other in zip((y, *gradients[0]), (oracle, *gradients[1]), strict=True):
        assert one.dtype == dtype
        assert bool((one.double() - other).abs().max() <= EPSILON[dtype] * other.abs().max())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", [SIZE, 37])
def test_a_norm(dtype: torch.dtype, size: int) -> None:
    weight = draw(size, dtype=dtype, seed=1)

    def expect(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()

    check(lambda x: normalize(x, weight, 1e-5), expect, draw(ROWS, LENGTH, size, dtype=dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shared", [False, True], ids=["positions of each row", "the same positions"])
def test_rotary_positions(dtype: torch.dtype, shared: bool) -> None:
    angles = draw(1 if shared else ROWS, LENGTH, SIZE, dtype=torch.float32, seed=1)
    cos, sin = (one.to(dtype) for one in (angles.cos(), angles.sin()))

    def expect(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1)
        return x * cos.double().unsqueeze(2) + turned * sin.double().unsqueeze(2)

    check(lambda x: rotate(x, cos, sin), expect, draw(ROWS, LENGTH, 4, SIZE, dtype=dtype))


@pytest.mark.usefixtures("isa")
def test_a_gate(dtype: torch.dtype) -> None:
    gate = 4 * draw(ROWS, LENGTH, SIZE, dtype=dtype)
    gate[0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -20.0])
    check(multiply_gate, lambda gate, up: F.silu(gate) * up, gate, draw(ROWS, LENGTH, SIZE, dtype=dtype, seed=1))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("positions", [LENGTH, 39])
def test_attention_to_some_positions(dtype: torch.dtype, positions: int) -> None:
    q = draw(ROWS, 4, LENGTH, SIZE, dtype=dtype)
    keys, values = (draw(ROWS, 2, positions, SIZE, dtype=dtype, seed=seed) for seed in (1, 2))
    seen = torch.rand(ROWS, LENGTH, positions, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[..., 0] = True

    def expect(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, keys, values, seen.unsqueeze(1), scale=0.3, enable_gqa=True)

    check(lambda q, k, v: attend(q, k, v, seen, 0.3), expect, q, keys, values)


def test_a_query_that_sees_nothing_gets_nothing(dtype: torch.dtype) -> None:
    q, keys = (draw(1, 1, 2, SIZE, dtype=dtype, seed=seed).requires_grad_(True) for seed in (0, 1))
    seen = torch.tensor([[[False, False], [True, False]]])
    y = attend(q, keys, keys, seen, 1.0)
    assert torch.equal(y[0, 0, 0], torch.zeros(SIZE, dtype=dtype))
    assert torch.equal(y[0, 0, 1], keys[0, 0, 0])
    assert all(bool(one.isfinite().all()) for one in torch.autograd.grad(y.sum(), [q, keys]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("weight_dtype", EPSILON, ids=["fp32 weights", "bf16 weights"])
def test_gains_are_added_in_float32(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    above, x = draw(40, 24, dtype=dtype), draw(40, 56, dtype=dtype, seed=1)
    weight, sums = draw(24, 56, dtype=weight_dtype, seed=2), draw(24, 56, dtype=torch.float32, seed=3)
    expected = sums.double() + weight.double() * (above.double().T @ x.double())
    add_gains(sums, above, x, weight)
    assert float((sums - expected).abs().max()) <= EPSILON[dtype] * float(expected.abs().max())


def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, weight = draw(600, 96, dtype=dtype), draw(96, dtype=dtype, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = normalize(x, weight, 1e-5), multiply_gate(x, x + 1)
        torch.set_num_threads(3)
        shared = normalize(x, weight, 1e-5), multiply_gate(x, x + 1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(alone, shared, strict=True))


def test_other_devices_and_dtypes_are_left_to_torch() -> None:
    assert not serves_rows(torch.ones(2, dtype=torch.float16))
    assert not serves_rows(torch.ones(2, device="meta"))
