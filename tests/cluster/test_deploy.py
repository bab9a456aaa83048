"""`masquerade ray deploy` on a cluster of one node: an upgrade under load drops nothing, and the load adds replicas."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.serving import free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
ENV = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "OMP_NUM_THREADS": "1",
}
BODY = {
    "model": "demo:casual",
    "prompt": "Once",
    "max_tokens": 300,
    "stream": True,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray cluster that ends with the test."""
    port = free_port()
    options = ["--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=4", "--block"]
    ray = Path(sys.executable).with_name("ray")
    with (tmp_path / "ray.log").open("wb") as log:
        head = subprocess.Popen(
            [ray, "start", *options, f"--object-store-memory={2**27}"], env=ENV, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)


def deploy(config: Path, address: str, *more: str) -> None:
    command = [
        sys.executable,
        "-m",
        "masquerade",
        "ray",
        "deploy",
        "--config",
        str(config),
        "--address",
        address,
        *more,
    ]
    ended = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


class Load:
    """Streams, one after the other in each of several threads."""

    def __init__(self, url: str, threads: int) -> None:
        self.texts: list[str] = []
        self.failures: list[str] = []
        self._url = url
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with httpx.stream("POST", f"{self._url}/v1/completions", json=BODY, timeout=120) as response:
                    lines = [line for line in response.iter_lines() if line]
                if lines[-1] != "data: [DONE]":
                    self.failures.append(lines[-1])
                self.texts.append("".join(line.partition('"text":')[2][:40] for line in lines))
            except (httpx.HTTPError, IndexError) as error:
                self.failures.append(repr(error))


def count_replicas(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    return sum(line.startswith("masquerade_ready{") for line in text.splitlines())


def test_an_upgrade_under_load_drops_nothing_and_load_adds_replicas(cluster: str, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "deployment.toml"
    config.write_text(f'[ray.deploy]\nmodel = "demo"\nstore = "{tmp_path / "store"}"\nport = {port}\ncpus = 0.5\n')
    deploy(config, cluster)
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200
    assert count_replicas(url) == 1
    load = Load(url, threads=4)
    with load.running():
        deploy(config, cluster, "--max-replicas", "2", "--target-requests", "0.3")
        upgraded = len(load.texts)
        deadline = time.monotonic() + 240
        while count_replicas(url) < 2:
            assert time.monotonic() < deadline
            time.sleep(1)
    assert load.failures == []
    assert upgraded > 4
    assert len(set(load.texts)) == 1


def test_without_a_cluster_it_says_how_to_start_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "masquerade", "ray", "deploy", "--store", str(tmp_path), "--address"]
    ended = subprocess.run([*command, f"127.0.0.1:{free_port()}"], env=ENV, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ray start --head" in ended.stderr.splitlines()[-1]
