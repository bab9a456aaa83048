"""What fits into an amount of memory, as arithmetic line by line, and what would make the rest fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.model.quantized import A8, QUANTIZATIONS
from masquerade.plan.footprint import (
    PADDING,
    count_blocks,
    measure_block,
    measure_persona,
    measure_served,
    measure_weights,
)
from masquerade.plan.outline import Outline

PROCESS = 540 * 2**20  # Python, torch and the server on a CPU (benchmarks/RESULTS.md, "What a server takes")


@dataclass(frozen=True)
class Workload:
    """What a server is to hold at the same time."""

    personas: int  # masks on the device
    context: int  # tokens of a request, prompt and answer
    requests: int  # the most that run
    rho: float  # share that a mask prunes


@dataclass(frozen=True)
class Line:
    """A line of the arithmetic."""

    what: str
    nbytes: int


@dataclass(frozen=True)
class Remedy:
    """A change of an option, and the bytes that it saves."""

    option: str
    saves: int


@dataclass(frozen=True)
class Fit:
    """The arithmetic of a workload: its personas and one of its requests must fit; more requests may."""

    memory: int
    lines: tuple[Line, ...]  # what has to fit: of serving or of loading, whichever takes more
    spare: int  # bytes beside the process and the weights; negative if these do not fit
    persona: int  # bytes of a mask
    block: int  # bytes of a KV cache block
    request: int  # blocks of a request
    workload: Workload

    @property
    def needed(self) -> int:
        """The sum of the lines."""
        return sum(line.nbytes for line in self.lines)

    @property
    def missing(self) -> int:
        """Bytes that are needed and not there; 0 if it fits."""
        return max(0, self.needed - self.memory)

    def count_requests(self, personas: int) -> int:
        """How many requests fit at once beside so many personas."""
        return max(0, (self.spare - personas * self.persona - PADDING * self.block) // (self.request * self.block))

    def count_personas(self, requests: int, nbytes: int) -> int:
        """How many personas of so many bytes fit beside the KV cache of so many requests."""
        return max(0, (self.spare - (requests * self.request + PADDING) * self.block) // nbytes)

    @property
    def requests(self) -> int:
        """How many of the workload's requests run at once beside its personas."""
        return min(self.workload.requests, self.count_requests(self.workload.personas))

    @property
    def cache_bytes(self) -> int:
        """`--cache-bytes` for these requests."""
        return self.requests * self.request * self.block

    @property
    def mask_bytes(self) -> int:
        """`--mask-bytes` for the workload's personas."""
        return self.workload.personas * self.persona


def fit(outline: Outline, workload: Workload, memory: int, quantization: str | None = None) -> Fit:
    """Fit a workload into `memory` bytes. Raises `ValueError` if the model cannot be quantised so."""
    weights, dense = measure_served(outline, quantization), measure_weights(outline, outline.dtype)
    persona, block = measure_persona(outline, workload.rho, quantization).nbytes, measure_block(outline)
    blocks = count_blocks(workload.context)
    process = [Line("Python, torch and the server", PROCESS)] if outline.device == "cpu" else []
    serving = [
        *process,
        Line(f"weights in {name_form(outline, quantization)}", weights),
        Line(f"masks of {workload.personas} personas of rho {workload.rho:g}", workload.personas * persona),
        Line(f"KV cache of 1 request of {workload.context} tokens", (blocks + PADDING) * block),
    ]
    loading = []
    if quantization in QUANTIZATIONS and not outline.stored and outline.device == "cpu":  # dense ones are loaded first
        loading = [*process, Line(f"weights in {name_dtype(outline.dtype)}, before they are quantised", dense)]
    lines = max(serving, loading, key=lambda lines: sum(line.nbytes for line in lines))
    spare = memory - weights - sum(line.nbytes for line in process)
    return Fit(memory, tuple(lines), spare, persona, block, blocks, workload)


def find_remedies(outline: Outline, found: Fit, quantization: str | None = None) -> list[Remedy]:
    """What would lower the need, each change alone, the largest saving first."""

    def save(other: Outline, workload: Workload, quantised: str | None) -> int:
        try:
            return found.needed - fit(other, workload, found.memory, quantised).needed
        except ValueError:  # bitsandbytes cannot
            return 0

    workload = found.workload
    smaller = _shrink(outline, quantization)
    remedies = [Remedy(option, save(other, workload, quantised)) for option, other, quantised in smaller]
    context, personas = _fit_context(found), max(1, min(workload.personas - 1, found.count_personas(1, found.persona)))
    remedies += [
        Remedy(f"--context {context}", save(outline, replace(workload, context=context), quantization)),
        Remedy(f"--personas {personas}", save(outline, replace(workload, personas=personas), quantization)),
    ]
    return sorted((one for one in remedies if one.saves > 0), key=lambda one: one.saves, reverse=True)


def _shrink(outline: Outline, quantization: str | None) -> Iterator[tuple[str, Outline, str | None]]:
    """Smaller weights: the option, the outline and the quantisation."""
    if outline.dtype.itemsize > torch.bfloat16.itemsize:
        narrow = replace(outline, model=copy.deepcopy(outline.model).to(torch.bfloat16))
        yield "--dtype bfloat16", narrow, quantization
    can_keep = (A8,) if outline.saved and not outline.keeps else ()
    for how in (*can_keep, *QUANTIZATIONS) if quantization is None else ():
        yield f"--quantization {how}", outline, how


def _fit_context(found: Fit) -> int:
    """The longest request that fits beside the personas, or half of the present one."""
    blocks = (found.spare - found.mask_bytes) // found.block - PADDING
    return min(blocks, found.request - 1) * BLOCK_SIZE if blocks > 0 else max(1, found.workload.context // 2)


def name_form(outline: Outline, quantization: str | None) -> str:
    """How the weights are kept: their dtype, after what quantises those of the maskable Linears, or a file's blocks."""
    dtype = name_dtype(outline.dtype)
    if quantization == A8 or (outline.keeps and not quantization):
        return f"the file's blocks and {dtype}"
    return f"{quantization} and {dtype}" if quantization else dtype


def name_dtype(dtype: torch.dtype) -> str:
    """The name that `--dtype` has for it."""
    return str(dtype).removeprefix("torch.")
