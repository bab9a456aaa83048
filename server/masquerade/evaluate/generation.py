"""Generates text with a treatment in left-padded batches, for measurements and calibration text.

The engine serves requests; this module runs where there is no engine, and with treatments that the engine lacks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.metrics import Items
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, Span, make_route

TOKENS = 4096  # most padded prompt tokens of a batch; a longer prompt is alone
PASS_TOKENS = 512  # most padded prompt tokens of a pass


@dataclass(frozen=True)
class GenerationParams:
    """How to generate."""

    tokens: int = 48  # most new tokens
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    rows: int = 32  # most prompts of a batch


@torch.no_grad()
def generate(
    base: Base, prompts: Sequence[Encoded], treatment: Treatment = UNTREATED, params: GenerationParams | None = None
) -> Iterator[list[str]]:
    """Texts generated after the prompts, in order; the prompts' responses are ignored.

    Yields after each pass of the model: the texts that are finished, often none. The treatment is active within a pass
    only. The base must have its masks attached.
    """
    params = params or GenerationParams()
    random = torch.Generator().manual_seed(params.seed)
    for rows in _group([treatment.rewrite(prompt).prompt for prompt in prompts], params.rows):
        generated = yield from _generate(base, rows, treatment, params, random)
        yield [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in generated]


def write_answers(
    base: Base, prompts: Sequence[Encoded], treatment: Treatment = UNTREATED, params: GenerationParams | None = None
) -> Items[list[str]]:
    """All texts of `generate`, without the white space around them; a work item is a pass of the model."""
    found: list[str] = []
    for texts in generate(base, prompts, treatment, params):
        found += [text.strip() for text in texts]
        yield
    return found


def _group(prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[Sequence[int]]]:
    """Batches of at most `rows` prompts, in order."""
    group: list[Sequence[int]] = []
    for prompt in prompts:
        longest = max(map(len, [*group, prompt]))
        if group and (len(group) == rows or (len(group) + 1) * longest > TOKENS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    treatment: Treatment,
    params: GenerationParams,
    random: torch.Generator,
) -> Generator[list[str], None, list[list[int]]]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), longest, dtype=torch.long)  # 1 where there is a token, 0 at padding
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    ids, attention_mask = ids.to(base.device), attention_mask.to(base.device)
    cache = DynamicCache(config=base.model.config)
    generated: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    of_prompt = UNTREATED if treatment.applied is not None and treatment.phase == "decode" else treatment
    width = max(1, PASS_TOKENS // len(prompts))
    for start in range(0, longest - 1, width):
        stop = min(start + width, longest - 1)
        with treatment.around():
            _step(base, ids[:, start:stop], attention_mask[:, :stop], cache, of_prompt)
        yield []
    ids = ids[:, -1:]
    for _ in range(min(params.tokens, base.context - longest)):
        with treatment.around():
            logits = _step(base, ids, attention_mask, cache, treatment)
        tokens = _choose(treatment.shift(logits) if treatment.shift else logits, params, random)
        for row in list(unfinished):
            token = int(tokens[row])
            unfinished -= {row} if token in base.ends else set()
            generated[row] += [] if token in base.ends else [token]
        if not unfinished:
            break
        ids = tokens.to(base.device).unsqueeze(1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
        yield []
    return generated


def _step(base: Base, ids: Tensor, attention_mask: Tensor, cache: DynamicCache, treatment: Treatment) -> Tensor:
    """Logits after the last of `ids` [rows, new]; `attention_mask` [rows, past + new] is 0 at padding."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    spans = [Span(treatment.applied, 0, ids.numel())] if treatment.applied else []
    output = base.model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        route=make_route(spans, base.device),
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _choose(logits: Tensor, params: GenerationParams, random: torch.Generator) -> Tensor:
    if params.temperature == 0:
        return logits.float().argmax(-1).cpu()  # argmax of bfloat16 takes five times as long on a CPU
    probabilities = (logits.float().cpu() / params.temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=random).squeeze(1)
