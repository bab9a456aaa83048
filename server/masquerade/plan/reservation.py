"""What a server with given limits takes, told before it loads the model."""

from __future__ import annotations

from dataclasses import dataclass

from masquerade.engine import EngineConfig
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.errors import UnusableModel
from masquerade.model.quantized import QUANTIZATIONS
from masquerade.plan.fit import PROCESS, Line, name_dtype, name_form
from masquerade.plan.footprint import measure_persona, measure_pool, measure_served, measure_weights
from masquerade.plan.memory import MachineMemory, format_bytes
from masquerade.plan.outline import Outline


@dataclass(frozen=True)
class Reservation:
    """The most bytes that a server takes once it is full of requests and masks."""

    lines: tuple[Line, ...]
    tokens: int  # that the KV cache holds
    personas: int  # masks of `rho` that the budget of masks holds
    rho: float

    @property
    def nbytes(self) -> int:
        """The sum of the lines."""
        return sum(line.nbytes for line in self.lines)

    def describe(self) -> str:
        """One line for the log."""
        parts = ", ".join(f"{format_bytes(line.nbytes)} of {line.what}" for line in self.lines)
        return (
            f"takes up to {format_bytes(self.nbytes)}, beside the activations of a step: {parts}; room for "
            f"{self.tokens} tokens and {self.personas} personas of rho {self.rho:g}"
        )


def reserve(
    outline: Outline, config: EngineConfig, mask_bytes: int, rho: float, quantization: str | None = None
) -> Reservation:
    """What an engine of `config` and a budget of masks reserve. Raises `ValueError` as `measure_weights` does."""
    blocks, pool = measure_pool(outline, config.max_running, config.cache_bytes)
    lines = [
        Line(f"weights in {name_form(outline, quantization)}", measure_served(outline, quantization)),
        Line("KV cache", pool),
        Line("masks", mask_bytes),
    ]
    if outline.device == "cpu":
        lines.append(Line("Python, torch and the server", PROCESS))
    persona = measure_persona(outline, rho, quantization).nbytes
    return Reservation(tuple(lines), blocks * BLOCK_SIZE, mask_bytes // persona, rho)


def check_loadable(outline: Outline, memory: MachineMemory, quantization: str | None = None) -> None:
    """Raise `UnusableModel` if the weights alone are more than there is, whatever else runs.

    On a CPU, safetensors in the served dtype stay mapped files, which need no memory of their own. Weights that are not
    there are for loading to report.
    """
    on_cpu = outline.device == "cpu"
    if not outline.files or (on_cpu and not quantization and outline.is_mapped):
        return
    if quantization in QUANTIZATIONS and not outline.stored and on_cpu:
        weights = measure_weights(outline, outline.dtype)
    else:
        weights = measure_served(outline, quantization)
    most = memory.usable + memory.swap
    if weights > most:
        raise UnusableModel(
            f"{outline.name} does not fit: its weights in {name_dtype(outline.dtype)} take {format_bytes(weights)} "
            f"while they are loaded, and {outline.device} has {format_bytes(most)} in all; `masquerade plan` says what "
            "would fit"
        )
