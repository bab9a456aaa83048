"""A LoRA trained on the same examples as a mask, as a control.

Ours and not peft's: the control needs one forward hook per Linear and a strength, and peft would wrap the MaskedLinears
and be a dependency for this alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masquerade.evaluate.dataset import Encoded, batches
from masquerade.evaluate.splits import match
from masquerade.kernels import divergences, log_probabilities
from masquerade.model import Base, find_targets

RANK, SCALE, RATE, EXAMPLES = 4, 2.0, 2e-3, 8  # alpha is rank times scale; examples a step
EPOCHS = {"supervised": 2, "contrastive": 1}
HOLD = 1.0  # weight of the divergence from the base on neutral text


@dataclass(frozen=True)
class AdapterData:
    """What an adapter learns from: answers, those to avoid, and neutral text on which to stay the base."""

    own: Sequence[Encoded]
    contrast: Sequence[Encoded] = ()
    neutral: Sequence[Encoded] = ()


@dataclass(frozen=True, eq=False)
class Adapter:
    """y + scale x Aᵀ Bᵀ for every maskable Linear."""

    linears: Mapping[str, nn.Linear]
    pairs: Mapping[str, tuple[Tensor, Tensor]]  # A [rank, in], B [out, rank]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(a.nbytes + b.nbytes for a, b in self.pairs.values())

    @contextmanager
    def applied(self, strength: float = 1.0) -> Iterator[None]:
        """Within the context, the adapter is added to the model, scaled by `strength`."""

        def adapt(a: Tensor, b: Tensor) -> object:
            return lambda _, args, y: y + (strength * SCALE * F.linear(F.linear(args[0].to(a.dtype), a), b)).to(y.dtype)

        handles = [
            self.linears[name].register_forward_hook(adapt(a, b))  # type: ignore[arg-type]
            for name, (a, b) in self.pairs.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def train_adapter(
    base: Base, data: AdapterData, *, seed: int = 0, report: Callable[[], None] = lambda: None
) -> Adapter:
    """Train on the own answers; with a contrast, by the preference loss -log sigmoid(LL⁺ - LL⁻) of a prompt's pair.

    With neutral text, `HOLD` times KL(base ‖ adapted) on some of it is added to each step's loss. `report` is called
    after each step.
    """
    torch.manual_seed(seed)
    linears = find_targets(base.model)
    pairs = {name: _make(linear) for name, linear in linears.items()}
    adapter = Adapter(linears, pairs)
    optimizer = torch.optim.Adam([factor for pair in pairs.values() for factor in pair], lr=RATE)
    matched = match(data.own, data.contrast)
    work: list[list[Encoded]] = (
        [[data.own[i], data.contrast[j]] for i, j in matched] if matched else [[one] for one in data.own]
    )
    rng = random.Random(seed)
    for _ in range(EPOCHS["contrastive" if matched else "supervised"]):
        for step in _steps(work, rng):
            neutral = rng.sample(list(data.neutral), min(EXAMPLES, len(data.neutral)))
            optimizer.zero_grad()
            with torch.enable_grad():
                with adapter.applied():
                    torch.autograd.backward(_preference_loss(base, step) if matched else _supervised_loss(base, step))
                if neutral:
                    torch.autograd.backward(HOLD * _neutral_loss(base, neutral, adapter))
            optimizer.step()
            report()
    return Adapter(linears, {name: (a.detach(), b.detach()) for name, (a, b) in pairs.items()})


def _make(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    device = linear.weight.device
    a = torch.randn(RANK, linear.in_features, device=device) / math.sqrt(linear.in_features)
    b = torch.zeros(linear.out_features, RANK, device=device)
    return a.requires_grad_(True), b.requires_grad_(True)


def _steps(work: Sequence[Sequence[Encoded]], rng: random.Random) -> list[list[Encoded]]:
    """Every example once, similar lengths together, in random order."""
    order = sorted(work, key=lambda group: len(group[0]) + 8 * rng.random())
    steps = [
        [one for group in order[start : start + EXAMPLES] for one in group] for start in range(0, len(order), EXAMPLES)
    ]
    rng.shuffle(steps)
    return steps


def _likelihoods(base: Base, examples: Sequence[Encoded]) -> Tensor:
    """Mean log-likelihood a response token of each example, [examples]."""
    (batch,) = batches(examples, base.device, tokens=1 << 30)
    logits = base.model(input_ids=batch.ids, use_cache=False).logits[batch.predicts]
    nats = log_probabilities(logits, batch.ids.roll(-1, 1)[batch.predicts])
    rows, lengths = batch.predicts.nonzero()[:, 0], batch.predicts.sum(1)
    means = nats.new_zeros(len(lengths)).index_add(0, rows, nats) / lengths
    return means[torch.tensor(batch.index, device=base.device).argsort()]


def _supervised_loss(base: Base, examples: Sequence[Encoded]) -> Tensor:
    return -_likelihoods(base, examples).mean()


def _preference_loss(base: Base, examples: Sequence[Encoded]) -> Tensor:
    means = _likelihoods(base, examples)
    return -F.logsigmoid(means[::2] - means[1::2]).mean()


def _neutral_loss(base: Base, examples: Sequence[Encoded], adapter: Adapter) -> Tensor:
    """KL(base ‖ adapted) of the next token, mean nats over the tokens of the responses."""
    (batch,) = batches(examples, base.device, tokens=1 << 30)
    with torch.no_grad():
        before = base.model(input_ids=batch.ids, use_cache=False).logits[batch.predicts]
    with adapter.applied():
        after = base.model(input_ids=batch.ids, use_cache=False).logits[batch.predicts]
    return divergences(before, after).mean()
