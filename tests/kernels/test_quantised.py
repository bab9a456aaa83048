"""Products of weights in GGUF's blocks: the bits of the same weights in bfloat16, whatever the batch and its masks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from maskstore import encode
from masquerade.kernels import (
    NativeMask,
    NativeParts,
    NativeProduct,
    NativeSpan,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedWeight,
    correct,
    dense_tiles,
    dense_weight,
    footprint,
    native,
    serves,
)
from masquerade.kernels.quantised import FORMS, measure
from tests.model.gguf_blocks import quantise

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
ISAS = library.isas if (library := native.find_library()) else []
SIZES = {form: GGML_QUANT_SIZES[GGMLQuantizationType[form]] for form in FORMS}  # of a block: values, bytes


def pack(form: str, raw: NDArray[np.uint8], columns: int, *, rounds: bool = False) -> QuantisedWeight:
    weight = QuantisedWeight.empty(form, len(raw), columns, rounds=rounds)
    weight.write(0, raw)
    return weight


def round_values(form: str, raw: NDArray[np.uint8]) -> Tensor:
    """What a model that is dequantised when it is loaded has."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(raw, GGMLQuantizationType[form])).to(torch.bfloat16)


def fit(form: str, columns: int) -> int:
    """The next number of columns that are whole blocks."""
    values, _ = SIZES[form]
    return -(-columns // values) * values


def make_raw(form: str, out: int, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks of normally distributed weights."""
    return quantise(rng.normal(0, 0.1, (out, columns)).astype(np.float32), GGMLQuantizationType[form])


def make(form: str, out: int, columns: int, seed: int = 0) -> tuple[QuantisedLinear, nn.Linear]:
    """A quantised Linear, and the same in bfloat16."""
    rng = np.random.default_rng(seed)
    raw = make_raw(form, out, columns, rng)
    bias = nn.Parameter(torch.from_numpy(rng.normal(0, 1, out)).to(torch.bfloat16), requires_grad=False)
    plain = nn.Linear(columns, out).to(torch.bfloat16).requires_grad_(False)
    plain.weight.copy_(round_values(form, raw))
    plain.bias.copy_(bias)
    return QuantisedLinear(pack(form, raw, columns), bias), plain


def make_spans(
    linear: nn.Linear, masks: Sequence[tuple[str, float]], gammas: Sequence[float], seed: int
) -> list[NativeSpan]:
    """Rows from the second on take turns among masks."""
    rng, spans, shape = np.random.default_rng(seed), [], (linear.out_features, linear.in_features)
    tables = []
    for backend, share in masks:
        mask = correct(linear, encode(rng.random(shape) < share), backend)
        assert isinstance(mask, NativeMask)
        tables.append(NativeParts({"this": mask}, {"this": 0}))
    for row, gamma in enumerate(gammas if masks else (), 1):
        spans.append(NativeSpan(tables[row % len(tables)], 1 - gamma, row, row + 1))
    return spans


def find_gradient(linear: nn.Linear) -> Tensor:
    """Of five rows, for the sum of a product's squares."""
    x = torch.linspace(-1, 1, 5 * linear.in_features).view(5, -1).to(torch.bfloat16).requires_grad_()
    linear(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(FORMS)),
    st.integers(1, 140),
    st.sampled_from([32, 64, 96, 576, 2048, 2080, 4128]),
    st.lists(st.tuples(st.sampled_from(["bits", "list"]), st.sampled_from([0.003, 0.05, 0.5])), max_size=4),
    st.lists(st.sampled_from([0.0, 0.0, 0.3]), max_size=39),
    st.integers(0, 2**32 - 1),
)
def test_products_have_the_bits_of_those_in_bfloat16(
    form: str, out: int, columns: int, masks: list[tuple[str, float]], gammas: list[float], seed: int
) -> None:
    """Few rows, many rows, and masks of both kinds at any gamma; and no row depends on another."""
    columns = fit(form, columns)
    quantised, plain = make(form, out, columns, seed)
    x = torch.randn(1 + len(gammas), columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    spans, expected_spans = (make_spans(linear, masks, gammas, seed) for linear in (quantised, plain))
    for isa in ISAS:
        product, expected = NativeProduct(spans, isa), NativeProduct(expected_spans, isa)
        y = product(x, quantised.weight, quantised.bias, product.find("this"))
        assert torch.equal(y, expected(x, plain.weight, plain.bias, expected.find("this")))
        base = NativeProduct((), isa)
        assert torch.equal(base(x[:1], quantised.weight, quantised.bias)[0], y[0])


@pytest.mark.parametrize("form", FORMS)
def test_products_equal_the_formula(form: str) -> None:
    columns = fit(form, 576)
    quantised, _ = make(form, 70, columns)
    raw = make_raw(form, 70, columns, np.random.default_rng(0))
    x = torch.randn(7, columns).to(torch.bfloat16)
    expected = x.double() @ round_values(form, raw).double().T + quantised.bias.double()
    for isa in ISAS:
        y = NativeProduct((), isa)(x, quantised.weight, quantised.bias)
        assert torch.allclose(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_every_scale_and_every_code(form: str) -> None:
    """All 65536 scales of fp16, denormal, infinite and NaN ones too, with random codes and offsets."""
    (values, nbytes), scales, rng = SIZES[form], np.arange(2**16, dtype="<u2"), np.random.default_rng(0)
    raw, columns = rng.integers(0, 256, (len(scales), nbytes), np.uint8), max(values, 128)
    at = nbytes - 2 if form == "Q6_K" else 0
    raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    raw = raw.reshape(-1, columns // values * nbytes)
    expected, weight = round_values(form, raw), pack(form, raw, columns)
    inputs = torch.eye(columns, dtype=torch.bfloat16)[torch.from_numpy(rng.permutation(columns))]

    def agrees(values: Tensor, wanted: Tensor) -> bool:
        return bool(((values == wanted) | (values.isnan() & wanted.isnan())).all())

    assert agrees(weight.read(), expected)
    for isa in ISAS:
        product = NativeProduct((), isa)
        for rows in (4, 8, 40):  # in registers, tile by tile, in panels
            assert agrees(product(inputs[:rows], weight, None), product(inputs[:rows], expected, None))


@pytest.mark.parametrize("form", FORMS)
def test_dense_weights_are_the_rounded_values(form: str) -> None:
    quantised, plain = make(form, 33, fit(form, 96))
    assert torch.equal(dense_weight(quantised), plain.weight)
    assert torch.equal(torch.cat([tile for _, tile in dense_tiles(quantised)]), plain.weight)
    assert torch.equal(quantised.weight.read(torch.tensor([32, 0, 7, 7])), plain.weight[[32, 0, 7, 7]])


@pytest.mark.parametrize("backend", ["reference", "sparse", "bits", "list"])
def test_masks_are_those_of_the_plain_weight(backend: str) -> None:
    quantised, plain = make("Q4_1", 40, 96)
    target, x = encode(np.random.default_rng(1).random((40, 96)) < 0.05), torch.randn(3, 96).to(torch.bfloat16)
    found, expected = (correct(linear, target, backend) for linear in (quantised, plain))
    assert torch.equal(found(x), expected(x))
    assert found.nbytes == expected.nbytes
    assert footprint(quantised, target.kind, 200) == footprint(plain, target.kind, 200)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_inputs_are_those_of_the_plain_weight(form: str) -> None:
    quantised, plain = make(form, 12, fit(form, 64))
    assert torch.equal(find_gradient(quantised), find_gradient(plain))


def test_embeddings_are_rows() -> None:
    quantised, plain = make("Q8_0", 50, 64)
    embedding, ids = QuantisedEmbedding(quantised.weight), torch.tensor([[3, 49, 0], [3, 3, 48]], dtype=torch.int32)
    assert torch.equal(embedding(ids), plain.weight[ids.long()])
    assert embedding(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 64)
    for wrong in (-1, 50):
        with pytest.raises(IndexError, match="from 0 to 49"):
            embedding(torch.tensor([wrong]))


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_that_of_the_file_or_of_codes_in_bytes(form: str) -> None:
    """Codes of 5 and 6 bits take 8."""
    values, nbytes = SIZES[form]
    wider = {"Q5": 3, "Q6": 2}.get(form[:2], 0)
    bits = 8 * nbytes / values + wider
    assert measure(form, 768, 768) == pytest.approx(768 * 768 * bits / 8, rel=0.04)  # tiles end with a cache line
    assert pack(form, np.zeros((4, nbytes), np.uint8), values).nbytes == measure(form, 4, values)


def test_copies_are_weights() -> None:
    quantised, plain = make("Q4_1", 6, 32)
    for other in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised))):
        assert torch.equal(dense_weight(other), plain.weight)
        assert other.weight.data_ptr() != quantised.weight.data_ptr()
    assert serves(quantised)


def test_inputs_of_another_dtype_or_width_are_refused() -> None:
    quantised, _ = make("Q8_0", 6, 32)
    for x in (torch.zeros(1, 32), torch.zeros(1, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"do not fit the weight \(6, 32\) of torch.bfloat16"):
            quantised(x)
