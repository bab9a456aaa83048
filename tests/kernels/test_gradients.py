"""Products with gradients: those of float64, in every dtype, whether or not the processor multiplies bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masquerade.kernels import differentiate, gradients, multiply_transposed, widen
from masquerade.kernels.native import find_library
from tests.kernels.test_quantised import make

OUT, IN, ROWS = 24, 64, 7
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=[False, True], ids=["bf16", "no bf16"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor has no instructions for bfloat16."""
    monkeypatch.setattr(gradients, "_is_slow", lambda: request.param)
    return bool(request.param)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_near(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= EPSILON[found.dtype] * expected.abs().max())


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.usefixtures("slow")
def test_values_and_gradients_are_those_of_float64(dtype: torch.dtype, biased: bool) -> None:
    x = draw(2, ROWS, IN, dtype=dtype, seed=0).requires_grad_(True)
    weight, above = draw(OUT, IN, dtype=dtype, seed=1), draw(2, ROWS, OUT, dtype=dtype, seed=2)
    bias = draw(OUT, dtype=dtype, seed=3) if biased else None
    y = differentiate(x, weight, bias)
    (gradient,) = torch.autograd.grad(y, x, above)
    assert (y.dtype, gradient.dtype) == (dtype, dtype)
    expected = x.detach().double() @ weight.double().T + (0 if bias is None else bias.double())
    assert is_near(y.detach(), expected)
    assert is_near(gradient, above.double() @ weight.double())


@pytest.mark.skipif(find_library() is None, reason="needs the native kernels")
@pytest.mark.usefixtures("slow")
def test_a_quantised_weight_has_the_gradients_of_its_values() -> None:
    linear, plain = make("Q8_0", OUT, IN)
    x = draw(ROWS, IN, dtype=torch.bfloat16, seed=0).requires_grad_(True)
    above = draw(ROWS, OUT, dtype=torch.bfloat16, seed=2)
    y = differentiate(x, linear.weight, None)
    (gradient,) = torch.autograd.grad(y, x, above)
    values = plain.weight.detach().double()
    assert is_near(y.detach(), x.detach().double() @ values.T)
    assert is_near(gradient, above.double() @ values)


@pytest.mark.usefixtures("slow")
def test_a_weight_that_is_trained_gets_its_gradient() -> None:
    x, weight = draw(ROWS, IN, dtype=torch.bfloat16, seed=0), draw(OUT, IN, dtype=torch.bfloat16, seed=1)
    above = draw(ROWS, OUT, dtype=torch.bfloat16, seed=2)
    (gradient,) = torch.autograd.grad(differentiate(x, weight.requires_grad_(True), None), weight, above)
    assert is_near(gradient, above.double().T @ x.double())


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.usefixtures("slow")
def test_the_gradient_of_a_weight_is_summed_in_float32(dtype: torch.dtype) -> None:
    left, right = draw(300, OUT, dtype=dtype, seed=0), draw(300, IN, dtype=dtype, seed=1)
    found = multiply_transposed(left, right)
    assert found.dtype is torch.float32
    assert float((found - left.double().T @ right.double()).abs().max()) <= EPSILON[dtype] * float(found.abs().max())


def test_only_bfloat16_is_converted_and_only_where_it_is_slow(slow: bool) -> None:
    assert widen(torch.ones(2, dtype=torch.bfloat16)).dtype is (torch.float32 if slow else torch.bfloat16)
    for dtype in (torch.float32, torch.float64, torch.float16):
        values = torch.ones(2, dtype=dtype)
        assert widen(values) is values
