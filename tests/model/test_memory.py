"""What was freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from pathlib import Path
from masquerade.model import trim_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

some = [bytearray(60_000) for _ in range(2000)]  # below what is mapped by itself
kept = some[::50]
del some
before = resident()
trim_heap()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_goes_back_though_some_beside_it_lives_on() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000
