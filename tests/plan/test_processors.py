"""The number of threads that compute, by what the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from masquerade.plan import processors
from masquerade.plan.processors import Processors, read_processors

ASK = "import torch; print(torch.get_num_threads())"
LIMIT = f"from masquerade.plan.processors import limit_threads; limit_threads(); {ASK}"


@pytest.mark.parametrize(
    ("found", "threads"),
    [
        (Processors(8, 8), 8),
        (Processors(8, 4), 4),  # two processors a core
        (Processors(64, 32, quota=2.5), 2),
        (Processors(64, 32, quota=0.5), 1),
        (Processors(2, 2, quota=8.0), 2),
    ],
)
def test_a_thread_a_core_within_the_quota(found: Processors, threads: int) -> None:
    assert found.threads == threads


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000\n", None), ("250000 100000\n", 2.5), ("", None), ("odd\n", None)]
)
def test_the_quota_of_a_container(
    content: str, quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(content)
    monkeypatch.setattr(processors, "_QUOTA", file)
    assert read_processors().quota == quota


def test_a_process_without_a_quota_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_QUOTA", tmp_path / "none")
    found = read_processors()
    assert found.quota is None
    assert 1 <= found.cores <= found.logical == len(os.sched_getaffinity(0))


def test_torch_keeps_to_the_processors_of_its_process_and_to_what_the_user_says() -> None:
    assert ask({}, {0}) == 1
    if (os.cpu_count() or 1) > 1:  # MKL allows no more than there are
        assert ask({"OMP_NUM_THREADS": "2"}, {0}) == 2


def ask(env: dict[str, str], affinity: set[int]) -> int:
    """The threads of torch in a process that may run on these processors."""
    others = {key: value for key, value in os.environ.items() if key != processors.VARIABLE}
    here = os.sched_getaffinity(0)
    if not affinity <= here:
        pytest.skip(f"this process may not run on the processors {affinity}")
    done = subprocess.run(
        [sys.executable, "-c", LIMIT],
        env={**others, **env},
        preexec_fn=lambda: os.sched_setaffinity(0, affinity),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)
