"""Log probabilities of the tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masquerade.engine.request import PromptToken

ROWS = 32  # scored at a time: the distributions of a long prompt would take much memory


def score_tokens(logits: Tensor, tokens: Sequence[int], count: int) -> list[PromptToken]:
    """Score each token by its row of logits [tokens, vocabulary], any float dtype, with the `count` most likely ones.

    The rank of a token is one more than the number of tokens that are more likely.
    """
    scored: list[PromptToken] = []
    for start in range(0, len(tokens), ROWS):
        some = tokens[start : start + ROWS]
        logprobs = logits[start : start + ROWS].float().log_softmax(-1)
        own = logprobs.gather(-1, torch.tensor([[token] for token in some], device=logits.device))
        ranks = ((logprobs > own).sum(-1) + 1).tolist()
        values, order = (part.tolist() for part in logprobs.topk(min(count, logprobs.shape[-1])))
        for row, (token, logprob) in enumerate(zip(some, own.squeeze(-1).tolist(), strict=True)):
            top = tuple(zip(order[row], values[row], strict=True))
            scored.append(PromptToken(token, logprob, ranks[row], top))
    return scored
