"""The base as the drafter of its personas: how many of a persona's tokens it would have guessed, on a real model.

`python -m benchmarks.drafter --json [--quick]`. The model is `smollm2` with the personas that ship for it; they answer
prompts that were held out when they were built. A greedy token is guessed if it is the base's most likely one after the
same text; a sampled one is accepted with the probability sum_v min(p(v), q(v)) of speculative sampling (Leviathan et
al. 2023), of the persona's and the base's distributions p and q at the temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks._world import load_smollm2
from maskstore import read_mask
from masquerade import smollm2
from masquerade.engine import Engine, Request, SamplingParams
from masquerade.evaluate.dataset import Encoded, encode, read_examples
from masquerade.evaluate.metrics import predict
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import AppliedMask, Base, MaskManager

PROMPTS, TOKENS, TEMPERATURE = 32, 48, 0.7
DRAFT = 4  # tokens of a draft


def main() -> None:
    options = arguments(__doc__, "a quarter of the prompts").parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    base = load_smollm2()
    manager = MaskManager.attach(base.model)
    figures: list[Figure] = []
    for file in sorted(smollm2.PERSONAS.glob("*.safetensors")):
        mask = read_mask(file)
        applied = AppliedMask(manager.fit(mask), mask.info.gamma)
        held_out = encode(base, read_examples(smollm2.DATA / f"{file.stem}.heldout.jsonl"))
        prompts = [one.prompt for one in held_out[: PROMPTS // 4 if options.quick else PROMPTS]]
        for temperature in (0.0, TEMPERATURE):
            figures += measure(base, applied, prompts, temperature, f"{file.stem}, temperature {temperature:g}")
    report("drafter", figures, options.json)


def measure(
    base: Base, mask: AppliedMask, prompts: Sequence[tuple[int, ...]], temperature: float, name: str
) -> Iterator[Figure]:
    """The share of tokens that are guessed, and the mean number of the first `DRAFT` tokens of a draft."""
    requests = [
        Request(
            list(prompt),
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
        guess(base, mask, Encoded(prompt, tuple(answer)), temperature)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]
    runs = [
        float(one[start : start + DRAFT].cumprod(0).sum()) for one in guessed for start in range(len(one) - DRAFT + 1)
    ]
    yield Figure(f"{name}: tokens that the base guesses", float(torch.cat(guessed).mean()), "share")
    yield Figure(f"{name}: accepted of a draft of {DRAFT}", sum(runs) / max(1, len(runs)), "tokens")


@torch.inference_mode()
def guess(base: Base, mask: AppliedMask, text: Encoded, temperature: float) -> Tensor:
    """With which probability the base guesses each token of a response, fp32 [tokens]."""
    masked, plain = (
        next(predict(base, [text], treatment)).logits.float()
        for treatment in (Treatment(applied=mask, phase="decode"), UNTREATED)
    )
    if not temperature:
        return (plain.argmax(-1) == torch.tensor(text.response)).float()
    return torch.minimum(*((logits / temperature).softmax(-1) for logits in (masked, plain))).sum(-1)


if __name__ == "__main__":
    main()
