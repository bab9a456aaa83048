"""What single pieces of work cost that hold a thread others wait for.

`python -m benchmarks.costs --json [--quick]`. Thread CPU time, on one thread; the least of several turns, except for
the work items of a build, of which the longest counts. The build is of the demo's `casual` against `formal`, with its
facts as neutral text; items that use no model are left out, because a server runs them beside the model's thread. As
in a server, what is loaded is kept out of garbage collection, of which a full pass takes 0.2 s.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from masquerade import demo
from masquerade.engine import Token
from masquerade.errors import UnusableModel
from masquerade.evaluate.dataset import read_examples
from masquerade.generation.answers import OutputDelta
from masquerade.http import bodies
from masquerade.kernels import dense
from masquerade.model import MaskManager, load
from masquerade.model.masked_linear import CurrentRoute, MaskedLinear
from masquerade.model.short_attention import FUSED, NAME
from masquerade.openai.answers import ChatAnswer
from masquerade.openai.objects import ChatCompletionChunk
from masquerade.pruning import Builder, PersonaExamples, Recipe
from masquerade.service.serving import ResolvedPersona
from masquerade.sources import find_model

WIDTHS = (64, 576, 2048)
TURNS = 7


def main() -> None:
    options = arguments(__doc__, "one score; within a minute").parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    figures = [*measure_bodies(), *measure_chunks(), *measure_linears(), *measure_attention()]
    for score in ("auto",) if options.quick else ("auto", "sparsegpt"):
        figures += measure_items(score)
    report("costs", [*figures, *measure_smollm2()], options.json)


def measure_bodies() -> Iterator[Figure]:
    """Parsing bodies at their limits."""
    text = json.dumps({"messages": [{"content": "many words of text " * 410_000}]})
    cases = {
        "8 MB of text": text,
        "most values": json.dumps([1] * (bodies.MOST_VALUES - 2)),
        "most names": json.dumps({f"n{number}": 1 for number in range(bodies.MOST_NAMES - 1)}),
        "most lists": json.dumps([[]] * (bodies.MOST_CONTAINERS - 2)),
    }
    for name, case in cases.items():
        content = case.encode()
        yield Figure(f"parse a body, {name}", 1e3 * least(lambda content=content: bodies.parse(content)), "CPU-ms")  # type: ignore[misc]


def measure_chunks() -> Iterator[Figure]:
    """A streamed chunk, written by hand and by way of its model."""
    answer = ChatAnswer(load("demo", device="cpu"), ResolvedPersona("demo"))
    delta = OutputDelta(0, " party", [Token(7, " party")])
    chunk = ChatCompletionChunk.model_validate_json(answer.chunks(delta).removeprefix("data: "))
    fields = chunk.model_dump()
    by_hand = least(lambda: [answer.chunks(delta) for _ in range(1000)]) / 1000
    by_model = least(lambda: [ChatCompletionChunk.model_validate(fields).model_dump_json() for _ in range(1000)]) / 1000
    yield Figure("a streamed chunk, written by hand", 1e6 * by_hand, "CPU-us")
    yield Figure("a streamed chunk, by way of its model", 1e6 * by_model, "CPU-us")


def measure_linears() -> Iterator[Figure]:
    """A product of one row by `MaskedLinear`, and by a forward hook that computes it after torch's own."""
    for dtype in (torch.float32, torch.bfloat16):
        for width in WIDTHS:
            linear, x = nn.Linear(width, width, dtype=dtype), torch.randn(1, width, dtype=dtype)
            masked, hooked = MaskedLinear("linear", linear, CurrentRoute()), nn.Linear(width, width, dtype=dtype)
            hooked.register_forward_hook(multiply_again)
            with torch.inference_mode():
                calls = 2_000_000 // (width * width) + 20
                ours, theirs = (
                    least(lambda module=module, calls=calls, x=x: [module(x) for _ in range(calls)])  # type: ignore[misc]
                    for module in (masked, hooked)
                )
            yield Figure(f"a forward hook / MaskedLinear, {str(dtype)[6:]}, {width}", theirs / ours, "x")


def measure_attention() -> Iterator[Figure]:
    """torch's fused attention beside that of short sequences, in bfloat16 with 9 query heads and 3 of keys of size 64.

    A row has 40 positions before its queries. The backward pass includes the forward pass.
    """
    for rows, queries in ((32, 1), (8, 48), (4, 128)):
        heads = ((9, queries), (3, queries + 40), (3, queries + 40))
        states = [torch.randn(rows, *shape, 64, dtype=torch.bfloat16, requires_grad=True) for shape in heads]
        mask = torch.ones(rows, 1, queries, queries + 40, dtype=torch.bool)
        module = nn.Module()

        def attend(name: str, module: nn.Module = module, states: Any = states, mask: Tensor = mask) -> Tensor:
            result: Tensor = ALL_ATTENTION_FUNCTIONS[name](module, *states, mask)[0]
            return result

        module.num_key_value_groups = 3  # type: ignore[assignment]
        fused, short = (least(lambda name=name: torch.no_grad()(attend)(name)) for name in (FUSED, NAME))  # type: ignore[misc]
        yield Figure(f"fused / short attention, {rows} rows of {queries}", fused / short, "x")
        fused, short = (least(lambda name=name: attend(name).float().sum().backward()) for name in (FUSED, NAME))  # type: ignore[misc]
        yield Figure(f"fused / short attention, {rows} rows of {queries}, backward", fused / short, "x")


def multiply_again(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear)
    return dense(args[0], module.weight, module.bias)


def measure_items(score: str) -> Iterator[Figure]:
    """The longest work item of each stage of a build."""
    base = load("demo", device="cpu")
    own, other, facts = (
        read_examples(demo.DATA / name) for name in ("casual.train.jsonl", "formal.train.jsonl", "facts.jsonl")
    )
    sides = PersonaExamples("casual", own), PersonaExamples("formal", other)
    work = Builder(base, MaskManager.attach(base.model), Recipe(score=score, force=True), *sides, facts).run()
    gc.collect()
    gc.freeze()
    longest: dict[str, float] = defaultdict(float)
    uses_model = False
    while True:
        started = time.thread_time()
        step = next(work, None)
        if step is None:
            break
        if uses_model:
            longest[step.stage] = max(longest[step.stage], time.thread_time() - started)
        uses_model = step.model_next
    gc.unfreeze()
    for stage, seconds in longest.items():
        yield Figure(f"longest work item of {stage}, {score}", 1e3 * seconds, "CPU-ms", "<= 100")


def measure_smollm2() -> Iterator[Figure]:
    """Identifying and loading SmolLM2, after a first load has fetched and cached its file."""
    try:
        load("smollm2", device="cpu")
    except UnusableModel as error:
        print(f"left out: {error}", file=sys.stderr)
        return
    identify = least(find_model("smollm2").fingerprint)
    yield Figure("identify smollm2", identify, "CPU-s")
    yield Figure("identify and load smollm2", least(lambda: load("smollm2", device="cpu")), "CPU-s")


def least(work: Callable[[], object]) -> float:
    """Seconds of thread CPU time."""
    times = []
    for _ in range(TURNS):
        started = time.thread_time()
        work()
        times.append(time.thread_time() - started)
    return min(times)


if __name__ == "__main__":
    main()
