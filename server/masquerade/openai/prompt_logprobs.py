"""Log probabilities of the tokens of prompts: how many a request may ask for, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from masquerade.engine import PromptToken, token_bytes
from masquerade.errors import InvalidValue
from masquerade.openai.schemas import GenerationRequest

MAX_SCORES = 2**17  # log probabilities of prompts in one answer, which writes each with its token


def check_scores(request: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """Raises `InvalidValue` for a request whose answer would have more than `MAX_SCORES`."""
    if request.num_prompt_logprobs is None:
        return
    tokens, each = sum(map(len, prompts)) * (request.n or 1), 1 + request.num_prompt_logprobs
    if tokens * each > MAX_SCORES:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidValue(
            f"{tokens} tokens of prompts with {each} log probabilities each are {tokens * each}; the limit of a "
            f"request is {MAX_SCORES}",
            param=param,
        )


def render_prompt_logprobs(
    tokenizer: Any, scores: Sequence[PromptToken], count: int
) -> list[dict[str, dict[str, Any]] | None]:
    """As vLLM writes them: by token id, of the token itself and of the `count` most likely ones."""

    def write(token: int, logprob: float, rank: int) -> dict[str, Any]:
        decoded = token_bytes(tokenizer, token).decode(errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": decoded}

    rendered: list[dict[str, dict[str, Any]] | None] = []
    for score in scores:
        if score.logprob is None:
            rendered.append(None)
            continue
        own = {str(score.id): write(score.id, score.logprob, score.rank)}
        top = {str(token): write(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top[:count], 1)}
        rendered.append(own | {token: written for token, written in top.items() if token not in own})
    return rendered
