"""Log-probabilities and divergences of logits, and their gradients, against float64."""

import pytest
import torch
from torch import Tensor

from masquerade.kernels import distributions, divergences, log_probabilities

SHAPES = (0, 7), (1, 1), (5, 40), (37, 301)


@pytest.fixture(params=[1, 700, 1 << 19])  # less than a row, some rows, all rows at a time
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "CACHED", request.param)


def draw(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


def exact_divergences(before: Tensor, after: Tensor) -> Tensor:
    plain, changed = before.log_softmax(-1), after.log_softmax(-1)
    return (plain.exp() * (plain - changed)).sum(-1)


def differentiate(found: Tensor, logits: Tensor, scales: Tensor) -> Tensor:
    """The gradient of the sum of what was found, each times its scale; in the logits' dtype."""
    (gradient,) = torch.autograd.grad(found, logits, scales.to(found.dtype))
    return gradient


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_and_their_gradients(shape: tuple[int, int]) -> None:
    logits = draw(shape, 0).requires_grad_(True)
    exact = logits.detach().double().requires_grad_(True)
    ids = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(1))
    scales = draw((shape[0], 1), 2).squeeze(1)
    found, wanted = log_probabilities(logits, ids), exact.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    gradient, right = differentiate(found, logits, scales), differentiate(wanted, exact, scales)
    assert torch.allclose(gradient.double(), right, atol=1e-5)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("shape", SHAPES)
def test_divergences_and_their_gradients(shape: tuple[int, int]) -> None:
    before, after = draw(shape, 0), draw(shape, 1).requires_grad_(True)
    exact = after.detach().double().requires_grad_(True)
    scales = draw((shape[0], 1), 2).squeeze(1)
    found, wanted = divergences(before, after), exact_divergences(before.double(), exact)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    gradient, right = differentiate(found, after, scales), differentiate(wanted, exact, scales)
    assert torch.allclose(gradient.double(), right, atol=1e-5)


def test_gradients_of_half_precision_are_rounded_once() -> None:
    before, after = draw((6, 50), 0, torch.bfloat16), draw((6, 50), 1, torch.bfloat16).requires_grad_(True)
    ids, scales = torch.arange(6), torch.ones(6)
    exact = after.detach().double().requires_grad_(True)
    pairs = (
        (log_probabilities(after, ids), exact.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)),
        (divergences(before, after), exact_divergences(before.double(), exact)),
    )
    for found, wanted in pairs:
        gradient, right = differentiate(found, after, scales), differentiate(wanted, exact, scales)
        assert gradient.dtype is torch.bfloat16
        assert ((gradient.double() - right).abs() <= 2**-8 * right.abs() + 1e-7).all()


def test_the_distribution_that_is_compared_with_gets_no_gradient() -> None:
    before, after = (draw((3, 9), seed).requires_grad_(True) for seed in (0, 1))
    divergences(before, after).sum().backward()
    assert before.grad is None
    assert after.grad is not None
