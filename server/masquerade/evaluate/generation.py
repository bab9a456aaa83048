"""Generates text with a treatment in batches, for measurements and calibration text.

What all prompts of a batch begin with is computed once, and a row that has ended leaves the batch.

The engine serves requests; this module runs where there is no engine, and with treatments that the engine lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.decoder import Decoder, make_decoders
from masquerade.evaluate.metrics import Items
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, NotNative

TOKENS = 4096  # most padded prompt tokens of a batch; a longer prompt is alone

# the number of a prompt and what its text begins with -> whether no more of it is needed
Suffices = Callable[[int, str], bool]


@dataclass(frozen=True)
class GenerationParams:
    """How to generate."""

    tokens: int = 48  # most new tokens
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    rows: int = 64  # most prompts of a batch


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
        generated = yield from _Batch(base, rows, treatment, params, random, enough).run()
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


@dataclass(frozen=True)
class _Batch:
    """Prompts that are continued together."""

    base: Base
    prompts: Sequence[tuple[int, ...]]
    treatment: Treatment
    params: GenerationParams
    random: torch.Generator
    enough: Callable[[int, list[int]], bool] | None  # a row and its tokens -> whether no more are needed

    def run(self) -> Generator[list[str], None, list[list[int]]]:
        """The tokens generated after each prompt, fewer where the context ends."""
        room = [self.base.context - len(prompt) for prompt in self.prompts]
        limits = [max(0, min(self.params.tokens, left)) for left in room]
        longest = max(len(prompt) + limit for prompt, limit in zip(self.prompts, limits, strict=True))
        *native, last = make_decoders(self.base, self.prompts, self.treatment, longest)
        for decoder in native:
            try:
                return (yield from self._decode(decoder, limits))
            except NotNative:
                yield []  # a pass in vain is a work item, too
        return (yield from self._decode(last, limits))

    def _decode(self, decoder: Decoder, limits: Sequence[int]) -> Generator[list[str], None, list[list[int]]]:
        for _ in decoder.read_prompts():
            yield []
        generated: list[list[int]] = [[] for _ in self.prompts]
        rows, ids = list(range(len(self.prompts))), [prompt[-1] for prompt in self.prompts]  # of rows that go on
        for tokens in range(1, max(limits) + 1):
            chosen = self._choose(decoder.step(ids), rows)
            going = [
                place
                for place, token in enumerate(chosen)
                if token not in self.base.ends and tokens <= limits[rows[place]]
            ]
            for place in going:
                generated[rows[place]].append(chosen[place])
            going = [place for place in going if tokens < limits[rows[place]]]
            if self.enough is not None:
                going = [place for place in going if not self.enough(rows[place], generated[rows[place]])]
            if not going:
                break
            if len(going) < len(rows):
                decoder.keep(going)
            rows, ids = [rows[place] for place in going], [chosen[place] for place in going]
            yield []
        return generated

    def _choose(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        shifted = self.treatment.shift(logits) if self.treatment.shift else logits
        if not self.params.temperature:
            chosen = shifted.float().argmax(-1)  # that of bfloat16 takes five times as long on a CPU
        else:
            draws = torch.rand(len(self.prompts), generator=self.random)[rows]  # a row's, whichever others go on
            chosen = _draw((shifted.float().cpu() / self.params.temperature).softmax(-1), draws)
        found: list[int] = chosen.tolist()
        return found


def _draw(probabilities: Tensor, draws: Tensor) -> Tensor:
    """A token of each row, int64 [rows]: where the running sum of its probabilities [rows, vocabulary] exceeds its draw
    from [0, 1).
    """
    sums = probabilities.cumsum(-1)
    whole = sums[:, -1]
    # The product may be rounded up to the whole sum, beyond which there is no token.
    below = torch.minimum(draws * whole, whole.nextafter(whole.new_zeros(())))
    return torch.searchsorted(sums, below[:, None], right=True).squeeze(1)
