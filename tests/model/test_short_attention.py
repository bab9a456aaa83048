"""Attention of short sequences beside float64, and beside transformers' own on a whole model."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from masquerade.kernels import gradients
from masquerade.model import load
from masquerade.model.short_attention import FUSED, MOST_PRODUCTS, NAME, attend_short


@pytest.fixture(autouse=True, params=[False, True], ids=["bf16", "no bf16"])
def _slow(request, monkeypatch):
    """Whether the processor multiplies bfloat16."""
    monkeypatch.setattr(gradients, "_is_slow", lambda: request.param)


def compute_exactly(q, k, v, mask, scale):
    """In float64, with keys and values repeated for their query heads."""
    q, k, v = (states.double() for states in (q, k, v))
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 3, 9])
@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (12, 30), (30, 30)])
@pytest.mark.parametrize("kind", ["bool", "added", "causal"])
def test_it_is_attention(dtype, kv_heads, queries, keys, kind):
    torch.manual_seed(queries)
    q, k, v = (torch.randn(2, heads, n, 16) for heads, n in ((9, queries), (kv_heads, keys), (kv_heads, keys)))
    q, k, v = (states.to(dtype).requires_grad_(True) for states in (q, k, v))
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, queries, keys)
    given = {"bool": visible, "added": torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e4)}.get(kind)
    if kind == "causal" and 1 < queries < keys:
        pytest.skip("causal attention without a mask is of equally many queries and keys")
    module = SimpleNamespace(is_causal=True, num_key_value_groups=9 // kv_heads)
    out, weights = attend_short(module, q, k, v, given, scaling=0.3)
    expected = compute_exactly(q, k, v, visible, 0.3)
    assert weights is None
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
    ours, exact = (torch.autograd.grad(o.double().square().sum(), (q, k, v)) for o in (out, expected))
    for one, other in zip(ours, exact, strict=True):
        assert (one.double() - other.double()).norm() < 0.02 * other.double().norm()


def test_scores_beyond_half_precision_are_finite():
    """Before they are scaled, those of a head of 128 may be above 65 504."""
    torch.manual_seed(0)
    q, k, v = (36 + 20 * torch.randn(1, 2, 4, 128) for _ in range(3))
    found = attend_short(nn.Module(), q.half(), k.half(), v.half(), None)[0].transpose(1, 2)
    expected = F.scaled_dot_product_attention(*(one.half().double() for one in (q, k, v)), is_causal=True)
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-3


def test_a_row_of_padding_is_finite():
    q = torch.randn(1, 2, 3, 16, dtype=torch.bfloat16)
    out, _ = attend_short(SimpleNamespace(num_key_value_groups=1), q, q, q, torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("length", [9, round(MOST_PRODUCTS**0.5) + 20])
def test_a_model_is_as_exact_as_with_the_fused_kernel(tiny_folder, length):
    base = load(str(tiny_folder), device="cpu", dtype="bfloat16")
    fused, exact = (
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype, attn_implementation=FUSED)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert base.model.config._attn_implementation == NAME
    ids = torch.randint(3, base.vocabulary, (8, min(length, base.context)))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        ours, theirs, right = (
            model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
            for model in (base.model, fused, exact)
        )
    assert (ours - right).abs().mean() < 1.2 * (theirs - right).abs().mean()


def test_in_float32_it_is_the_fused_kernel(tiny_folder, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, attn_implementation=FUSED)
    ids = torch.randint(3, tiny.vocabulary, (2, 12))
    with torch.no_grad():
        assert torch.equal(tiny.model(input_ids=ids).logits, model(input_ids=ids).logits)
