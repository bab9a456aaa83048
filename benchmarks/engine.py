"""Tokens per CPU-second of the engine, against transformers' `generate` and its continuous batching.

`python -m benchmarks.engine --json [--quick]`. All sides run the same random model on the same prompts and decode
greedily, without an end token, so that the work is equal; `generate` gets all prompts of a case as one static,
left-padded batch. Runs are interleaved and medians count, of ratios those of each round; time is CPU time of the whole
process, on one thread, from the prompts to the last token. The peers give whole steps to prompts; so does the engine
here, unless the figure says that it has the default settings. Decode steps, host work and the time between tokens are
CPU time, too.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from benchmarks._report import Figure, report
from benchmarks._world import VOCABULARY, make_base
from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, encode
from masquerade.engine import AnswerText, Engine, EngineConfig, Request, SamplingParams
from masquerade.model import AppliedMask, Base, MaskManager, find_targets

RHO = 0.003
PERSONAS = 8
GREEDY = SamplingParams(temperature=0)
# Set for throughput: running answers wait for whole steps of prompts.
PROMPTS_FIRST = EngineConfig(prefill_budget=512, speculate=False)


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    model: dict[str, int]
    lengths: tuple[int, int]  # of the prompts of 16 requests
    new: int
    long: int  # tokens of the prompt that arrives late
    quiet: int  # steps before it


FULL = Scale(
    {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 15, "num_attention_heads": 12},
    (400, 600),
    64,
    2000,
    40,
)  # 101 M parameters
QUICK = Scale(
    {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8},
    (200, 300),
    24,
    600,
    20,
)
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer tokens; within a minute")
    parser.add_argument("--only", choices=sorted(PARTS), help="one part of it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    scale = QUICK if options.quick else FULL
    parts = [PARTS[options.only]] if options.only else list(PARTS.values())
    figures = [figure for part in parts for figure in part(scale)]
    report("engine", figures, options.json)


def make_mask(base: Base, seed: int) -> Mask:
    rng = np.random.default_rng(seed)
    linears = find_targets(base.model).items()
    targets = {name: encode(rng.random(tuple(linear.weight.shape)) < RHO) for name, linear in linears}
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


def make_prompts(count: int, lengths: tuple[int, int]) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(4, VOCABULARY) for _ in range(rng.randint(*lengths))] for _ in range(count)]


def measure_throughput(scale: Scale) -> Iterator[Figure]:
    """1, 4 and 16 requests with long contexts, and 16 requests of 8 personas."""
    base = make_base(scale.model)
    manager = MaskManager.attach(base.model)
    applied_masks: list[AppliedMask | None] = [
        AppliedMask(manager.fit(make_mask(base, seed)), 0.0) for seed in range(PERSONAS)
    ]
    for count, rounds, bound in ((1, 7, ">= 1.0"), (4, 3, None), (16, 3, ">= 1.15")):
        prompts = make_prompts(count, scale.lengths)
        cases: dict[str, Callable[[], float]] = {
            "generate": partial(run_generate, base, prompts, scale.new),
            "base": partial(run_engine, base, prompts, [None], scale.new, PROMPTS_FIRST),
        }
        if count == 16:
            cases["default"] = partial(run_engine, base, prompts, [None], scale.new, EngineConfig(speculate=False))
            cases["personas"] = partial(run_engine, base, prompts, applied_masks, scale.new, PROMPTS_FIRST)
            cases["continuous"] = partial(run_continuous, base, prompts, scale.new)
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, run in cases.items():
                seconds[name].append(run())

        def compare(one: str, other: str, seconds: dict[str, list[float]] = seconds) -> float:
            """The speed of one case relative to another."""
            return float(np.median(np.array(seconds[other]) / np.array(seconds[one])))

        rate = {name: count * scale.new / float(np.median(spent)) for name, spent in seconds.items()}
        label = f"{count} requests"
        yield Figure(f"generate, {label}", rate["generate"], "tokens/CPU-s")
        yield Figure(f"engine, {label} of the base", rate["base"], "tokens/CPU-s")
        yield Figure(f"engine / generate, {label}", compare("base", "generate"), "x", bound)
        if count == 16:
            peer = "continuous batching of transformers"
            yield Figure(f"engine / {peer}, {label}", compare("base", "continuous"), "x", ">= 1.5")
            yield Figure(
                f"engine as it is set by default, for even streams / generate, {label}",
                compare("default", "generate"),
                "x",
            )
            yield Figure(f"{PERSONAS} personas / base, {label}", compare("personas", "base"), "x", ">= 0.8")
    manager.detach()


def run_engine(
    base: Base, prompts: list[list[int]], applied_masks: Sequence[AppliedMask | None], new: int, config: EngineConfig
) -> float:
    engine = Engine(base, config)
    requests = [
        Request(prompt, new, lambda _: None, applied_masks[place % len(applied_masks)], sampling=GREEDY)
        for place, prompt in enumerate(prompts)
    ]
    started = time.process_time()
    engine.generate(requests)
    seconds = time.process_time() - started
    engine.stop()
    return seconds


def run_generate(base: Base, prompts: list[list[int]], new: int, **options: object) -> float:
    longest = max(map(len, prompts))
    ids = torch.tensor([[3] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=3, eos_token_id=None
    )
    with plain_attention(base), torch.inference_mode():
        started = time.process_time()
        base.model.generate(ids, attention_mask=mask, generation_config=config, **options)
        return time.process_time() - started


def run_continuous(base: Base, prompts: list[list[int]], new: int) -> float:
    config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=3, eos_token_id=-1)
    blocks = -(-sum(len(prompt) + new for prompt in prompts) // 256) + len(prompts)
    how = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=512)
    with plain_attention(base):
        started = time.process_time()
        answers = base.model.generate_batch(prompts, generation_config=config, continuous_batching_config=how)
        seconds = time.process_time() - started
    assert all(len(answer.generated_tokens) == new for answer in answers.values())
    return seconds


@contextmanager
def plain_attention(base: Base) -> Iterator[None]:
    """The attention that transformers has by itself; bases have another one for short sequences."""
    attention = base.model.config._attn_implementation
    base.model.set_attn_implementation("sdpa")
    yield
    base.model.set_attn_implementation(attention)


def measure_host_work(_: Scale) -> Iterator[Figure]:
    """A decode step less its forward pass, with a small model and a vocabulary of 8192."""
    base = make_base(TINY)
    for count, bound, spoken in ((16, "<= 0.5", False), (64, "<= 1.0", False), (64, None, True)):
        engine = Engine(base, EngineConfig(max_running=count, speculate=False))
        forward, inside = base.model.forward, [0.0]

        def timed(forward: Callable[..., object] = forward, inside: list[float] = inside, **kw: object) -> object:
            started = time.thread_time()
            output = forward(**kw)
            inside[0] += time.thread_time() - started
            return output

        base.model.forward = timed
        requests = [
            Request(
                prompt,
                400,
                lambda _: None,
                sampling=GREEDY,
                text=AnswerText(base.tokenizer, ["END"]) if spoken else None,
            )
            for prompt in make_prompts(count, (90, 110))
        ]
        engine.submit(*requests)
        while any(not request.num_output_tokens for request in requests):
            engine.step()
        spent = []
        for _ in range(150):
            inside[0], started = 0.0, time.thread_time()
            engine.step()
            spent.append(time.thread_time() - started - inside[0])
        base.model.forward = forward
        engine.stop()
        name = f"host work of a step, {count} requests{', with text' if spoken else ''}, median"
        yield Figure(name, float(np.median(spent)) * 1e3, "CPU-ms", bound)


def measure_latency(scale: Scale) -> Iterator[Figure]:
    """Steps of 8 running requests, before and during the prefill of a long prompt."""
    base = make_base(scale.model)
    engine = Engine(base, EngineConfig(speculate=False))
    engine.submit(
        *(Request(prompt, 1000, lambda _: None, sampling=GREEDY) for prompt in make_prompts(8, (80, 120))),
    )
    while (
        any(request.num_uncomputed > 1 for request in engine._scheduler.running) or len(engine._scheduler.running) < 8
    ):
        engine.step()

    def step() -> float:
        started = time.process_time()
        engine.step()
        return time.process_time() - started

    quiet = [step() for _ in range(scale.quiet)]
    late = Request(make_prompts(1, (scale.long, scale.long))[0], 4, lambda _: None, sampling=GREEDY)
    engine.submit(late)
    busy: list[float] = []
    while not late.num_output_tokens:
        busy.append(step())
    engine.stop()
    before, during = (float(np.percentile(times, 95)) for times in (quiet, busy))
    yield Figure("time between tokens of 8 answers, 95th percentile", before * 1e3, "CPU-ms")
    yield Figure(
        f"the same while a prompt of {scale.long} tokens is worked off, in {len(busy)} steps / quiet",
        during / before,
        "x",
        "<= 3",
    )


def measure_decoding(scale: Scale) -> Iterator[Figure]:
    """Decode steps of 1, 4 and 16 streams without a persona, with one, and over eight, in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        base = make_base(scale.model)
        base.model.to(dtype)
        manager = MaskManager.attach(base.model)
        masks = [AppliedMask(manager.fit(make_mask(base, seed)), 0.0) for seed in range(PERSONAS)]
        for count in (1, 4, 16):
            cases: dict[int, Sequence[AppliedMask | None]] = {0: [None], 1: masks[:1], PERSONAS: masks}
            engines = {personas: start_decoding(base, count, applied) for personas, applied in cases.items()}
            spent: dict[int, list[float]] = {personas: [] for personas in engines}
            for _ in range(scale.quiet):
                for personas, engine in engines.items():
                    started = time.process_time()
                    engine.step()
                    spent[personas].append(time.process_time() - started)
            for engine in reversed(engines.values()):
                engine.stop()
            seconds = {personas: float(np.median(times)) for personas, times in spent.items()}
            label = f"{str(dtype).removeprefix('torch.')}, {count} streams"
            yield Figure(f"{label} of the base", count / seconds[0], "tokens/CPU-s")
            yield Figure(f"{label}, step of the base / of one persona", seconds[0] / seconds[1], "x", "<= 1.03")
            ratio = seconds[0] / seconds[PERSONAS]
            yield Figure(f"{label}, step of the base / of {PERSONAS} personas", ratio, "x", "<= 1.03")
        manager.detach()


def measure_layers(scale: Scale) -> Iterator[Figure]:
    """Decode steps in bf16 with layers in one native call, and with transformers' forward of each."""
    base = make_base(scale.model)
    base.model.to(torch.bfloat16)
    manager = MaskManager.attach(base.model)
    masks: list[AppliedMask | None] = [AppliedMask(manager.fit(make_mask(base, seed)), 0.0) for seed in range(PERSONAS)]
    bare: list[AppliedMask | None] = [None]
    forwards = {module: vars(module)["forward"] for module in base.model.modules() if "forward" in vars(module)}

    def assign(native: bool) -> None:
        for module, forward in forwards.items():
            if native:
                module.forward = forward
            else:
                vars(module).pop("forward", None)

    for count, applied in ((1, bare), (1, masks), (16, bare), (16, masks)):
        engines = {native: start_decoding(base, count, applied) for native in (True, False)}
        spent: dict[bool, list[float]] = {native: [] for native in engines}
        for _ in range(scale.quiet):
            for native, engine in engines.items():
                assign(native)
                started = time.process_time()
                engine.step()
                spent[native].append(time.process_time() - started)
        assign(True)
        for engine in reversed(engines.values()):
            engine.stop()
        worn = "the base" if applied is bare else f"{min(count, PERSONAS)} personas"
        label = f"bf16, {count} streams of {worn}"
        yield Figure(f"{label}, step", float(np.median(spent[True])) * 1e3, "CPU-ms")
        ratio = float(np.median(np.array(spent[False]) / np.array(spent[True])))
        yield Figure(f"{label}, step with transformers' layers / native", ratio, "x")
    manager.detach()


def start_decoding(base: Base, count: int, applied: Sequence[AppliedMask | None]) -> Engine:
    """An engine whose requests have computed their prompts."""
    engine = Engine(base, EngineConfig(speculate=False, cache_bytes=2**27))
    prompts = make_prompts(count, (90, 110))
    requests = [
        Request(prompt, 1000, lambda _: None, applied[place % len(applied)], sampling=GREEDY)
        for place, prompt in enumerate(prompts)
    ]
    engine.submit(*requests)
    while any(not request.num_output_tokens for request in requests):
        engine.step()
    return engine


PARTS = {
    "decode": measure_decoding,
    "host": measure_host_work,
    "latency": measure_latency,
    "layers": measure_layers,
    "throughput": measure_throughput,
}

if __name__ == "__main__":
    main()
