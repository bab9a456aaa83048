"""Generates text with a treatment in left-padded batches, for measurements and calibration text.

What all prompts of a batch begin with is computed once, and a row that has ended leaves the batch.

The engine serves requests; this module runs where there is no engine, and with treatments that the engine lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.metrics import Items
from masquerade.evaluate.prefix import count_shared, extend, of_prompt
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, Span, make_route

TOKENS = 4096  # most padded prompt tokens of a batch; a longer prompt is alone
PASS_TOKENS = 512  # most padded prompt tokens of a pass

# the number of a prompt and what its text begins with -> whether no more of it is needed
Suffices = Callable[[int, str], bool]


@dataclass(frozen=True)
class GenerationParams:
    """How to generate."""

    tokens: int = 48  # most new tokens
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    rows: int = 32  # most prompts of a batch


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Encoded],
    treatment: Treatment = UNTREATED,
    params: GenerationParams | None = None,
    suffices: Suffices | None = None,
) -> Iterator[list[str]]:
    """Texts generated after the prompts, in order; the prompts' responses are ignored.

    Yields after each pass of the model: the texts that are finished, often none. The treatment is active within a pass
    only. The base must have its masks attached.
    """
    params = params or GenerationParams()
    random = torch.Generator().manual_seed(params.seed)
    first = 0
    for rows in _group([treatment.rewrite(prompt).prompt for prompt in prompts], params.rows):
        enough = None if suffices is None else partial(_suffice, base, suffices, first)
        generated = yield from _generate(base, rows, treatment, params, random, enough)
        yield [_decode(base, ids) for ids in generated]
        first += len(rows)


def write_answers(
    base: Base,
    prompts: Sequence[Encoded],
    treatment: Treatment = UNTREATED,
    params: GenerationParams | None = None,
    suffices: Suffices | None = None,
) -> Items[list[str]]:
    """All texts of `generate`, without the white space around them; a work item is a pass of the model."""
    found: list[str] = []
    for texts in generate(base, prompts, treatment, params, suffices):
        found += [text.strip() for text in texts]
        yield
    return found


def _group(prompts: Sequence[tuple[int, ...]], rows: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of at most `rows` prompts, in order."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        longest = max(map(len, [*group, prompt]))
        if group and (len(group) == rows or (len(group) + 1) * longest > TOKENS):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


def _decode(base: Base, ids: Sequence[int]) -> str:
    text: str = base.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _suffice(base: Base, suffices: Suffices, first: int, row: int, ids: Sequence[int]) -> bool:
    return suffices(first + row, _decode(base, ids))


def _read_prompts(
    base: Base, prompts: Sequence[tuple[int, ...]], treatment: Treatment
) -> Generator[list[str], None, tuple[DynamicCache, Tensor, Tensor]]:
    """The keys and values of all prompts but their last tokens, those tokens, and where there are tokens."""
    shared, longest = count_shared(prompts), max(map(len, prompts))
    cache = DynamicCache(config=base.model.config)
    for start in range(0, shared, PASS_TOKENS):
        extend(base, cache, prompts[0][start : min(start + PASS_TOKENS, shared)], treatment)
        yield []
    if shared:
        cache.batch_repeat_interleave(len(prompts))
    ids = torch.zeros(len(prompts), longest - shared, dtype=torch.long)
    attention_mask = torch.ones(len(prompts), longest, dtype=torch.long)  # 0 at padding, after the shared tokens
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt[shared:])
        attention_mask[row, shared : shared + longest - len(prompt)] = 0
    ids, attention_mask = ids.to(base.device), attention_mask.to(base.device)
    width = max(1, PASS_TOKENS // len(prompts))
    for start in range(0, longest - shared - 1, width):
        stop = min(start + width, longest - shared - 1)
        with treatment.around():
            _step(base, ids[:, start:stop], attention_mask[:, : shared + stop], cache, of_prompt(treatment))
        yield []
    return cache, ids[:, -1:], attention_mask


def _generate(
    base: Base,
    prompts: Sequence[tuple[int, ...]],
    treatment: Treatment,
    params: GenerationParams,
    random: torch.Generator,
    enough: Callable[[int, list[int]], bool] | None,
) -> Generator[list[str], None, list[list[int]]]:
    cache, ids, attention_mask = yield from _read_prompts(base, prompts, treatment)
    generated: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # that go on
    for _ in range(min(params.tokens, base.context - attention_mask.shape[1])):
        with treatment.around():
            logits = _step(base, ids, attention_mask, cache, treatment)
        noise = None if params.temperature == 0 else _draw(len(prompts), logits.shape[-1], random)[rows]
        tokens = _choose(treatment.shift(logits) if treatment.shift else logits, params.temperature, noise)
        going = [place for place, token in enumerate(tokens.tolist()) if token not in base.ends]
        for place in going:
            generated[rows[place]].append(int(tokens[place]))
        if enough is not None:
            going = [place for place in going if not enough(rows[place], generated[rows[place]])]
        if not going:
            break
        if len(going) < len(rows):
            index = torch.tensor(going, device=base.device)
            cache.batch_select_indices(index)
            attention_mask, tokens, rows = attention_mask[index], tokens[going], [rows[place] for place in going]
        ids = tokens.to(base.device).unsqueeze(1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
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


def _draw(rows: int, vocabulary: int, random: torch.Generator) -> Tensor:
    """The noise of one token of each row, fp32 [rows, vocabulary]; the same for a row whichever rows go on."""
    return torch.empty(rows, vocabulary).exponential_(generator=random)


def _choose(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """The likeliest token of each row; with noise, one that is drawn as `torch.multinomial` does."""
    if noise is None:
        return logits.float().argmax(-1).cpu()  # argmax of bfloat16 takes five times as long on a CPU
    return ((logits.float().cpu() / temperature).softmax(-1) / noise).argmax(-1)
