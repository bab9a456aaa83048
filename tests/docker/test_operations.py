"""docs/operations.md is true: its sizes are what the code reserves, its commands back a store up and restore it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from maskstore import Bitmap, Sparse
from maskstore.target import Target
from masquerade.engine.kv_cache import bytes_per_position
from masquerade.kernels import native
from tests.cli.running import succeed
from tests.docker.manifests import ROOT
from tests.serving import serve

TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
LLAMA = {  # hidden, intermediate, layers, heads, key-value heads, head size, tied embeddings
    "1B": (2048, 8192, 16, 32, 8, 64, True),
    "8B": (4096, 14336, 32, 32, 8, 128, False),
    "70B": (8192, 28672, 80, 64, 8, 128, False),
}
VOCABULARY, RHO, POSITIONS = 128_256, 0.003, 4096


def shapes(model: str) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's Linears."""
    hidden, inner, _, heads, few, size, _ = LLAMA[model]
    attention = {"q": (heads * size, hidden), "k": (few * size, hidden), "v": (few * size, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return attention | {"o": (hidden, heads * size)} | mlp


def list_bytes(out: int, columns: int, pruned: int) -> int:
    return 4 * (out + 1) + 2 * pruned


def bitmap_bytes(out: int, columns: int) -> int:
    return out * 8 * -(-columns // 64)


@pytest.mark.parametrize(("out", "columns"), [(5, 64), (7, 100), (64, 8192)])
def test_the_formulas_are_those_of_the_formats(out: int, columns: int) -> None:
    keep = np.random.default_rng(out).random((out, columns)) > 0.1
    bits = np.packbits(np.pad(keep, ((0, 0), (0, -columns % 64))), axis=1, bitorder="little")
    bitmap: Target = Bitmap(bits, columns)
    listed: Sparse = bitmap.to_sparse()
    assert bitmap.nbytes == bitmap_bytes(out, columns)
    assert listed.nbytes == list_bytes(out, columns, listed.pruned)


@pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
def test_lists_on_a_cpu_take_what_is_said() -> None:
    """But for what rounds a Linear's list up to cache lines."""

    def say(out: int, pruned: int, value: int) -> int:
        return (2 + value) * pruned + {2: 330, 4: 394}[value] * -(-out // 64)

    total = 0
    for out, columns in shapes("8B").values():
        pruned = round(out * columns * RHO)
        for dtype in (torch.bfloat16, torch.float32):
            linear = nn.Linear(columns, out, bias=False, dtype=dtype, device="meta")
            found = native.NativeList.footprint(linear, pruned)
            assert 0 <= found - say(out, pruned, dtype.itemsize) <= 128
            total += found if dtype is torch.bfloat16 else 0
    assert f"{LLAMA['8B'][2] * total / 1e6:.1f} MB for the 8B model" in TEXT


def row(model: str) -> list[int]:
    """A column of the table."""
    hidden, _, layers, _, few, size, tied = LLAMA[model]
    linears = shapes(model)
    weights = layers * sum(out * columns for out, columns in linears.values()) + VOCABULARY * hidden * (2 - tied)
    lists = {name: list_bytes(*shape, round(shape[0] * shape[1] * RHO)) for name, shape in linears.items()}
    config = SimpleNamespace(num_hidden_layers=layers, num_attention_heads=1, num_key_value_heads=few, head_dim=size)
    position = bytes_per_position(config, torch.bfloat16)
    whole, outputs = sum(lists.values()), lists["o"] + lists["down"]
    bitmaps = sum(bitmap_bytes(*shape) for shape in linears.values())
    return [2 * weights, layers * whole, layers * outputs, layers * bitmaps, position, POSITIONS * position]


def test_the_table_of_sizes() -> None:
    lines = re.findall(r"^\| (?:weights|a persona|keys and values)[^|]*\|(.*)\|$", TEXT, re.MULTILINE)
    told = [[int(cell.replace(" ", "")) for cell in line.split("|")] for line in lines]
    assert [list(column) for column in zip(*told, strict=True)] == [row(model) for model in LLAMA]


def run(block: str, store: Path, backup: Path) -> str:
    """A block of the page, in a shell."""
    told = os.environ | {"STORE": str(store), "BACKUP": str(backup)}
    script = block.replace("masquerade masks", f"{sys.executable} -m masquerade masks").replace(
        "python3", sys.executable
    )
    done = subprocess.run(["bash", "-euc", script], env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_backup_of_a_running_server_can_be_restored(tmp_path: Path) -> None:
    store, backup, restored = (tmp_path / name for name in ("store", "backup", "restored"))
    save, restore = (one for one in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if "$BACKUP" in one)
    with serve("--model", "demo", "--store", str(store)):
        key = succeed("keys", "add", "--store", store)["id"]
        succeed("masks", "alias", "sad", "gloomy", "--store", store)
        run(save, store, backup)
    run(restore, restored, backup)
    assert [one["id"] for one in succeed("keys", "ls", "--store", restored)["keys"]] == [key]
    told = [(one["persona"], one["digest"]) for one in succeed("masks", "ls", "--store", store)["personas"]]
    assert [(one["persona"], one["digest"]) for one in succeed("masks", "ls", "--store", restored)["personas"]] == told
    assert succeed("masks", "show", "sad", "--store", restored)["persona"] == "gloomy"
    assert (restored / "keys.sqlite").stat().st_mode & 0o777 == 0o600
    assert (restored / "audit.jsonl").read_bytes() == (store / "audit.jsonl").read_bytes()
