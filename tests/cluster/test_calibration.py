"""`masquerade build --shards`: the mask of one process, also if a shard's process is killed."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskstore import diff, read_mask
from masquerade.demo import DATA
from tests.cli.test_commands import fail, succeed

pytestmark = pytest.mark.timeout(600)
ENV = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 120


def list_options(folder: Path) -> list[str]:
    """A build of one persona of the demo."""
    for name in ("casual", "formal"):
        lines = (DATA / f"{name}.train.jsonl").read_text().splitlines()[:24]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    files = ("--data", str(folder / "casual.jsonl"), "--contrast", str(folder / "formal.jsonl"))
    return ["--name", "mate", *files, "--score", "attribution-fisher", "--rho", "0.001", "--phase", "all", "--force"]


def find_tasks(parent: int) -> Iterator[int]:
    """The processes below a process that collect a shard."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            below = parent in list_parents(int(folder.name))
        except OSError:
            continue  # it has ended
        if below and title.startswith(b"ray::_collect"):
            yield int(folder.name)


def list_parents(process: int) -> Iterator[int]:
    while process > 1:
        stat = Path(f"/proc/{process}/stat").read_text()
        process = int(stat.rpartition(")")[2].split()[1])
        yield process


@pytest.mark.long
def test_a_killed_shard_is_collected_again_and_the_mask_is_the_same(tmp_path: Path) -> None:
    options = list_options(tmp_path)
    command = [sys.executable, "-m", "masquerade", "build", *options, "--out", str(tmp_path / "divided")]
    command += ["--store", str(tmp_path / "s"), "--shards", "2", "--ray-address", "local"]
    build = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
    until = time.monotonic() + START_SECONDS
    while not (found := [*find_tasks(build.pid)]):
        assert time.monotonic() < until
        assert build.poll() is None
        time.sleep(0.02)
    os.kill(found[0], signal.SIGKILL)
    _, said = build.communicate(timeout=300)
    assert build.returncode == 0, said
    assert "shards: done, 2 in " in said
    succeed("build", *options, "--store", tmp_path / "t", "--out", tmp_path / "alone")
    masks = [read_mask(tmp_path / kind / "mate.safetensors") for kind in ("divided", "alone")]
    assert masks[0].pruned == masks[1].pruned > 0
    assert diff(*masks).total.jaccard > 0.99


def test_without_a_cluster_nothing_is_begun(tmp_path: Path) -> None:
    said = fail(
        1, "build", *list_options(tmp_path), "--store", tmp_path / "s", "--shards", "2", "--ray-address", "127.0.0.1:9"
    )
    assert "no Ray cluster answers at 127.0.0.1:9" in said
    assert not (tmp_path / "s").exists()
