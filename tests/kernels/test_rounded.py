"""Products whose inputs are rounded to 8 bits: those of the formula, row by row, whatever the batch and its masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskstore import encode
from masquerade.kernels import (
    NativeMask,
    NativeParts,
    NativeProduct,
    NativeSpan,
    QuantisedLinear,
    correct,
    native,
)
from masquerade.kernels.quantised import FORMS
from tests.kernels.test_quantised import ISAS, find_gradient, fit, make_raw, pack

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
GROUP = 32  # inputs with one scale


def make(form: str, out: int, columns: int, seed: int) -> tuple[QuantisedLinear, QuantisedLinear, Tensor]:
    """A Linear that rounds its inputs, the same that does not, and the values of the weight in float64."""
    rng = np.random.default_rng(seed)
    raw = make_raw(form, out, columns, rng)
    bias = nn.Parameter(torch.from_numpy(rng.normal(0, 1, out)).to(torch.bfloat16), requires_grad=False)
    rounding, exact = (pack(form, raw, columns, rounds=rounds) for rounds in (True, False))
    values = torch.from_numpy(dequantize(raw, GGMLQuantizationType[form])).double()
    return QuantisedLinear(rounding, bias), QuantisedLinear(exact, bias), values


def round_inputs(x: Tensor) -> Tensor:
    """Each 32 inputs to whole multiples of a 127th of the largest, in float64; levels are found in fp32."""
    groups = x.float().view(len(x), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    levels = (groups * torch.full_like(largest, 127).div(largest)).round()  # `127 / x` is a reciprocal
    return (levels.double() * (largest / 127).double()).view(x.shape)


def agree(y: Tensor, expected: Tensor) -> bool:
    """Up to the rounding of a sum in fp32, and of the result to bfloat16."""
    return torch.allclose(y.double(), expected, rtol=2**-8, atol=2e-3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(FORMS)),
    st.integers(1, 140),
    st.sampled_from([32, 64, 96, 576, 2080]),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
def test_rows_are_those_of_the_formula_alone_or_together(
    form: str, out: int, columns: int, rows: int, seed: int
) -> None:
    columns = fit(form, columns)
    linear, _, values = make(form, out, columns, seed)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    expected = round_inputs(x) @ values.T + linear.bias.double()
    for isa in ISAS:
        product = NativeProduct((), isa)
        y = product(x, linear.weight, linear.bias)
        assert agree(y, expected)
        assert torch.equal(product(x[-1:], linear.weight, linear.bias)[0], y[-1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_masks_take_their_weights_away(form: str, gamma: float) -> None:
    """The rows of lists are the base's but for the pruned weights; those of bitmaps are not rounded at all."""
    columns = fit(form, 576)
    linear, exact, values = make(form, 96, columns, 3)
    x = torch.randn(12, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rng, tables, kept = np.random.default_rng(5), [], []
    for backend, share in (("list", 0.003), ("list", 0.05), ("bits", 0.5)):
        pruned = rng.random((96, columns)) < share
        mask = correct(linear, encode(pruned), backend)
        assert isinstance(mask, NativeMask)
        tables.append(NativeParts({"this": mask}, {"this": 0}))
        kept.append(torch.from_numpy(~pruned))
    spans = [NativeSpan(tables[row % 3], 1 - gamma, row, row + 1) for row in range(9)]  # the last three are the base's
    rounded, stored = round_inputs(x), linear.weight.read().double()  # what a list subtracts is bfloat16
    for isa in ISAS:
        product, base = NativeProduct(spans, isa), NativeProduct((), isa)
        y = product(x, linear.weight, linear.bias, product.find("this"))
        exactly = NativeProduct(spans, "avx2" if isa == "avx512" else isa)  # which has no sums of integers
        unrounded = exactly(x, exact.weight, exact.bias, product.find("this"))
        assert torch.equal(y[9:], base(x, linear.weight, linear.bias)[9:])
        for row in range(9):
            if row % 3 == 2:
                assert torch.equal(y[row], unrounded[row])
                continue
            missing = (1 - gamma) * stored * ~kept[row % 3]
            assert agree(y[row], rounded[row] @ values.T - x[row].double() @ missing.T + linear.bias.double())
            assert (x[row].double() @ missing.T - rounded[row] @ missing.T).abs().max() < 0.02  # nearly the same


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_instruction_sets_from_avx2_on_change_nothing(form: str) -> None:
    columns = fit(form, 576)
    linear, _, _ = make(form, 300, columns, 1)
    x, found = torch.randn(9, columns).to(torch.bfloat16), []
    threads = torch.get_num_threads()
    for isa in ISAS[1:] or ISAS:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(NativeProduct((), isa)(x, linear.weight, linear.bias))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_finite_is_alone_with_that(form: str) -> None:
    columns = fit(form, 96)
    linear, _, values = make(form, 20, columns, 2)
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[0, 40], x[2, 3] = float("nan"), -float("inf")
    x[3] = 1e-38  # so little that a 127th has no inverse
    x[3, 7:] = 0
    for isa in ISAS:
        y = NativeProduct((), isa)(x, linear.weight, linear.bias)
        assert not y[[0, 2]].isfinite().any()
        assert agree(y[1:2], round_inputs(x[1:2]) @ values.T + linear.bias.double())
        assert torch.equal(y[3], linear.bias)


def test_gradients_and_rows_of_the_weight_are_exact() -> None:
    linear, exact, _ = make("Q4_1", 12, 64, 0)
    assert torch.equal(linear.weight.read(), exact.weight.read())
    assert torch.equal(find_gradient(linear), find_gradient(exact))
