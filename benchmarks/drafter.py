"""The base as the drafter of its personas: how many of a persona's tokens it would have guessed, on a real model.

`python -m benchmarks.drafter --json [--quick]`. The model is `smollm2` with the personas that ship for it; they answer
prompts that were held out when they were built. A greedy token is guessed if it is the base's most likely one after the
same text; a sampled one is accepted with the probability sum_v min(p(v), q(v)) of speculative sampling (Leviathan et
al. 2023), of the persona's and the base's distributions p and q at the temperature.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from maskstore import read_mask
from masquerade import smollm2
from masquerade.engine import Engine, Request, SamplingParams
from masquerade.errors import UnusableModel
from masquerade.model import AppliedMask, Base, MaskManager, Span, load, make_route, render_chat

PROMPTS, TOKENS, TEMPERATURE = 32, 48, 0.7
DRAFT = 4  # tokens of a draft


def main() -> None:
    options = arguments(__doc__, "a quarter of the prompts").parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        base = load("smollm2", device="cpu")
    except UnusableModel as error:
        sys.exit(f"{error}")
    manager = MaskManager.attach(base.model)
    figures: list[Figure] = []
    for file in sorted(smollm2.PERSONAS.glob("*.safetensors")):
        mask = read_mask(file)
        applied = AppliedMask(manager.fit(mask), mask.info.gamma)
        prompts = read_prompts(base, file.stem)[: PROMPTS // 4 if options.quick else PROMPTS]
        for temperature in (0.0, TEMPERATURE):
            figures += measure(base, applied, prompts, temperature, f"{file.stem}, temperature {temperature:g}")
    report("drafter", figures, options.json)


def read_prompts(base: Base, persona: str) -> list[list[int]]:
    """The token ids of the persona's held-out prompts."""
    lines = (smollm2.DATA / f"{persona}.heldout.jsonl").read_text().splitlines()
    return [render_chat(base.tokenizer, json.loads(line)["messages"][:1]) for line in lines]


def measure(
    base: Base, mask: AppliedMask, prompts: Sequence[list[int]], temperature: float, name: str
) -> Iterator[Figure]:
    """The share of tokens that are guessed, and the mean number of the first `DRAFT` tokens of a draft."""
    requests = [
        Request(
            prompt,
            TOKENS,
            lambda _: None,
            mask,
            "decode",
            sampling=SamplingParams(temperature=temperature, seed=seed),
            ends=base.ends,
        )
        for seed, prompt in enumerate(prompts)
    ]
    engine = Engine(base)
    answers = engine.generate(requests)
    engine.stop()
    guessed = [
        guess(base, mask, prompt, answer, temperature)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]
    runs = [
        float(one[start : start + DRAFT].cumprod(0).sum()) for one in guessed for start in range(len(one) - DRAFT + 1)
    ]
    yield Figure(f"{name}: tokens that the base guesses", float(torch.cat(guessed).mean()), "share")
    yield Figure(f"{name}: accepted of a draft of {DRAFT}", sum(runs) / max(1, len(runs)), "tokens")


@torch.inference_mode()
def guess(base: Base, mask: AppliedMask, prompt: list[int], answer: list[int], temperature: float) -> Tensor:
    """With which probability the base guesses each token of an answer, fp32 [tokens]."""
    first = len(prompt) - 1
    masked = predict(base, prompt + answer, [Span(mask, first, first + len(answer))])[first:-1]
    plain = predict(base, prompt + answer, [])[first:-1]
    if not temperature:
        return (plain.argmax(-1) == torch.tensor(answer)).float()
    return torch.minimum(*((logits / temperature).softmax(-1) for logits in (masked, plain))).sum(-1)


def predict(base: Base, ids: list[int], spans: list[Span]) -> Tensor:
    """The logits of a text, fp32 [tokens, vocabulary]."""
    route = make_route(spans, base.device)
    logits: Tensor = base.model(input_ids=torch.tensor([ids]), use_cache=False, route=route).logits[0]
    return logits.float()


if __name__ == "__main__":
    main()
