"""What the compiler says of the Triton kernels. The interpreter accepts what it may not, and it needs no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_kernel_compiles_for_a_device_without_spilling(tmp_path: Path) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    compiling = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    told = subprocess.run(compiling, capture_output=True, text=True, check=True, env=environment)
    weights = json.loads(told.stdout)
    assert len(weights) == 8
    assert {name: weight["spilled"] for name, weight in weights.items()} == dict.fromkeys(weights, 0)
