"""Log-probabilities and divergences of next-token distributions, without copies of all logits in fp32.

With a large vocabulary those copies take as long as the LM head of a small model, and most of the memory. A few rows
at a time stay in the processor's cache, and the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CACHED = 1 << 19  # logits in fp32 at a time on a CPU
LAUNCHED = 1 << 26  # on another device, where many small kernels would be slower


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """The log-probability of each id, nats, fp32 [n]; logits [n, vocabulary], which may require gradients, ids [n]."""
    found: Tensor = _LogProbabilities.apply(logits, ids)  # type: ignore[no-untyped-call]
    return found


def divergences(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of each row, nats, fp32 [n]; both are logits [n, vocabulary], of which `after` may require
    gradients.
    """
    found: Tensor = _Divergences.apply(before.detach(), after)  # type: ignore[no-untyped-call]
    return found


def _split(logits: Tensor) -> Iterator[slice]:
    """The rows to read at a time."""
    rows = max(1, (CACHED if logits.device.type == "cpu" else LAUNCHED) // logits.shape[-1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, ids)
        places = ids.unsqueeze(1)
        parts = [logits[rows].float().log_softmax(-1).gather(1, places[rows]).squeeze(1) for rows in _split(logits)]
        return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, ids = ctx.saved_tensors
        found, places, scales = torch.empty_like(logits), ids.unsqueeze(1), gradients[0].unsqueeze(1)
        for rows in _split(logits):
            part = logits[rows].float().softmax(-1).mul_(-scales[rows])
            found[rows] = part.scatter_add_(1, places[rows], scales[rows])
        return found, None


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor) -> Tensor:
        ctx.save_for_backward(before, after)
        found = before.new_zeros(len(before), dtype=torch.float32)
        for rows in _split(before):
            plain, changed = (logits[rows].float().log_softmax(-1) for logits in (before, after))
            found[rows] = changed.neg_().add_(plain).mul_(plain.exp_()).sum(-1)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        before, after = ctx.saved_tensors
        found = torch.empty_like(after)
        for rows in _split(before):
            plain, changed = (logits[rows].float().softmax(-1) for logits in (before, after))
            found[rows] = changed.sub_(plain).mul_(gradients[0][rows].unsqueeze(1))
        return None, found
