"""Compiles every Triton kernel for sm_90 in bf16, without a device, and prints what each one takes, as JSON.

Triton's interpreter must be off; the compiler, its assembler and the disassembler come with triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from masquerade.engine.cuda import paged
from masquerade.kernels.cuda import triton as masked

BF16, I32, I64, F32 = "*bf16", "*i32", "*i64", "*fp32"
TABLES = {"table": I64, "slots": I32, "rows": I32, "strengths": F32}
PAGED = {"repeat": 4, "size": 128, "cache_block": 16, "tile": 64, "heads": 16, "width": 128}


def list_kernels() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Name, kernel, pointers, constants and options of all that serving an 8B model needs."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    for some_out, width, unit in ((64, 1, "x_column"), (8, 32, "x_row")):
        constants = {"wide": False, "some_out": some_out, "some_listed": 16, "width": width, unit: 1}
        found.append((f"subtract {width}", masked._subtract, {"x": BF16, "y": BF16, **TABLES}, constants, {}))
    for width, program in [(16, program) for program in masked._FEW_ROWS] + [(64, masked._MANY_ROWS)]:
        options = program._asdict()
        constants = {"biased": True, "width": width, "exact": "ieee"}
        constants |= {name: options.pop(name) for name in ("some_out", "some_in")}
        pointers = {"x": BF16, "w": BF16, "bias": BF16, "y": BF16, **TABLES}
        found.append((f"multiply {width} x {program.some_out}", masked._multiply, pointers, constants, options))
    pointers = {"q": BF16, "keys": BF16, "values": BF16, "table": I32, "lengths": I32, "partial": F32, "weights": F32}
    found.append(("attend", paged._attend, pointers, PAGED, {}))
    splits = {"splits": 4, "size": 128, "width": 128}
    found.append(("combine", paged._combine, {"partial": F32, "weights": F32, "out": BF16}, splits, {}))
    return found


def compile_kernel(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], options: dict[str, int]) -> Any:
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    kinds |= {"scale": "fp32"} if "scale" in names else {}
    aligned = [
        name for name in names if name not in constants and name not in ("scale", "kv_heads", "splits", "table_row")
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature=kinds, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def weigh(compiled: Any) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, shared bytes of a program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        dump = [tool, "--dump-resource-usage", file.name]
        told = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": compiled.metadata.shared}


if __name__ == "__main__":
    json.dump({name: weigh(compile_kernel(*rest)) for name, *rest in list_kernels()}, sys.stdout)
