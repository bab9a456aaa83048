"""Answers of a treated base, many at a time.

Knows left-padded batches, a cache of keys and values, greedy and sampled tokens. Refuses to be the engine: it serves
nobody, and only measures and writes calibration text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.treatment import BARE, Treatment
from masquerade.model import Base, Span, make_route

ROWS = 32  # most prompts at a time
TOKENS = 512  # ... and most padded tokens of theirs, unless a prompt alone has more


@dataclass(frozen=True)
class Speech:
    """How to answer."""

    tokens: int = 48  # at most
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0


@torch.no_grad()
def answer(
    base: Base, prompts: Sequence[Encoded], treatment: Treatment = BARE, speech: Speech | None = None
) -> Iterator[list[str]]:
    """The texts that follow prompts (their responses are not read), in order.

    After each pass of the model comes a list of the texts that are finished, which is mostly empty. Between passes
    nothing of the treatment is left in the base, which must have its masks attached.
    """
    how = speech or Speech()
    random = torch.Generator().manual_seed(how.seed)
    for rows in _group([treatment.rewrite(prompt).prompt for prompt in prompts]):
        said = yield from _speak(base, rows, treatment, how, random)
        yield [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]


def _group(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Prompts that are answered together, in order."""
    group: list[Sequence[int]] = []
    for prompt in prompts:
        longest = max(map(len, [*group, prompt]))
        if group and (len(group) == ROWS or (len(group) + 1) * longest > TOKENS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _speak(
    base: Base, prompts: Sequence[Sequence[int]], treatment: Treatment, how: Speech, random: torch.Generator
) -> Generator[list[str], None, list[list[int]]]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    seen = torch.zeros(len(prompts), longest, dtype=torch.long)  # 1 where there is a token, 0 at padding
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        seen[row, longest - len(prompt) :] = 1
    ids, seen = ids.to(base.device), seen.to(base.device)
    cache = DynamicCache(config=base.model.config)
    said: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    bare_prompt = treatment.applied is not None and treatment.phase == "decode"
    if bare_prompt and longest > 1:
        with treatment.around():
            _step(base, ids[:, :-1], seen[:, :-1], cache, BARE)
        ids = ids[:, -1:]
        yield []
    for _ in range(min(how.tokens, base.context - longest)):
        with treatment.around():
            logits = _step(base, ids, seen, cache, treatment)
        tokens = _choose(treatment.shift(logits) if treatment.shift else logits, how, random)
        for row in list(open_rows):
            token = int(tokens[row])
            open_rows -= {row} if token in base.ends else set()
            said[row] += [] if token in base.ends else [token]
        if not open_rows:
            break
        ids = tokens.to(base.device).unsqueeze(1)
        seen = torch.cat([seen, seen.new_ones(len(prompts), 1)], dim=1)
        yield []
    return said


def _step(base: Base, ids: Tensor, seen: Tensor, cache: DynamicCache, treatment: Treatment) -> Tensor:
    """Logits after the last of `ids` [rows, new]; `seen` [rows, past + new] says what is padding."""
    positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    spans = [Span(treatment.applied, 0, ids.numel())] if treatment.applied else []
    output = base.model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        route=make_route(spans, base.device),
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _choose(logits: Tensor, how: Speech, random: torch.Generator) -> Tensor:
    if how.temperature == 0:
        return logits.argmax(-1).cpu()
    odds = (logits.float().cpu() / how.temperature).softmax(-1)
    return torch.multinomial(odds, 1, generator=random).squeeze(1)
