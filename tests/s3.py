"""An S3 service on loopback, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from tests.serving import free_port

_RUN = """
import sys
from werkzeug.serving import run_simple
from moto.server import DomainDispatcherApplication, create_backend_app
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=True)
"""


@dataclass
class Service:
    """A service, and the environment in which its clients find it."""

    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> Mapping[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-bucket",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def make_bucket(self, name: str) -> str:
        request = urllib.request.Request(f"{self.env['AWS_ENDPOINT_URL']}/{name}", method="PUT")
        with urllib.request.urlopen(request):
            return f"s3://{name}"

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.env['AWS_ENDPOINT_URL']}/moto-api/data.json"):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


@contextmanager
def serving() -> Iterator[Service]:
    """A running service, which this process's environment names."""
    service = Service(free_port())
    service.start()
    try:
        with mock.patch.dict(os.environ, service.env):
            yield service
    finally:
        service.stop()
