"""What a build with the default score takes: memory, operations and, on a CPU, time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from masquerade.plan.fit import Line
from masquerade.plan.footprint import measure_weights
from masquerade.plan.outline import Outline
from masquerade.pruning import Recipe

# A pair of SmolLM2 took 17.4 CPU minutes ("Masks of one ranking" in benchmarks/RESULTS.md); a pair of the demo, of 3.5
# million parameters, took 1.2 times what this says of it ("What a server takes").
CPU_SECONDS_A_PARAMETER = 17.4 * 60 / 134_515_008
BASIS = (
    "extrapolated by parameters from SmolLM2: 17.4 CPU minutes for 135 pairs in bfloat16 on one core of an AMD EPYC, "
    "7.8 us a parameter"
)
PEAK = "SmolLM2's build in bfloat16 peaked at 5.3 GB in its three processes, and these lines say 1.5 GB of it"
SIDES = 2  # a persona and its opposite


@dataclass(frozen=True)
class BuildCost:
    """The cost of a persona and its opposite with the default score."""

    lines: tuple[Line, ...]  # the memory that it takes at least
    operations: int  # floating-point operations of the search, at most
    cpu_seconds: float | None  # None on a GPU, where no build was timed

    @property
    def memory(self) -> int:
        """The least bytes: the process, activations and logits come on top."""
        return sum(line.nbytes for line in self.lines)


def estimate_build(outline: Outline, quantization: str | None = None) -> BuildCost:
    """The cost of a build on the outline's device (`pruning/search.py` says what a search keeps)."""
    weights, sides = outline.maskable, SIDES if outline.device == "cpu" else 1  # a process for each side, or in turn
    lines = [
        Line("weights", measure_weights(outline, outline.dtype, quantization)),
        Line("masked copies of the maskable weights", sides * weights * outline.dtype.itemsize),
        Line("their gains, in float32", sides * weights * torch.float32.itemsize),
    ]
    settings = Recipe().search_settings
    pairs = settings.batches_a_step * 2 * settings.pairs_a_batch
    texts = pairs + settings.neutral_batches_a_step * settings.neutral_a_batch
    multiplied = weights + outline.config.vocab_size * outline.config.hidden_size
    operations = SIDES * settings.steps * texts * settings.tokens * 6 * multiplied  # 2 forwards and 4 backwards
    seconds = CPU_SECONDS_A_PARAMETER * outline.parameters if outline.device == "cpu" else None
    return BuildCost(tuple(lines), operations, seconds)
