"""`docker/verify` and the image's health check: what they say of a container that is not as it should be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client.scripted import Answer, say, scripted
from tests.docker.manifests import DOCKER, ROOT

PROXY = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # nobody is there
# An engine whose container is as it should be until it serves: then it answers with what is no JSON, and does not end.
ENGINE = """
import json, os, re, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"Ready.")

words = " ".join(sys.argv)
print("the log of the container", file=sys.stderr, flush=True)
if "import json, os, shutil" in words:
    look = {"user": 10001, "writable": ["/tmp", "/var/lib/masquerade"], "compilers": [], "distributions": 1}
    print(json.dumps(look | {"megabytes": 2, "torch": 1}))
elif "doctor" in words:
    print(json.dumps({"wrong": [], "kernels": {"native": "avx2"}}))
elif "serve" in words:
    Path(os.environ["PID"]).write_text(str(os.getpid()))
    port = int(re.search(r"127.0.0.1:(\\d+):8000", words).group(1))
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.timeout(120)
def test_whatever_goes_wrong_is_shown_with_the_log_and_nothing_runs_on(tmp_path: Path) -> None:
    (tmp_path / "engine.py").write_text(ENGINE)
    told = {"ENGINE": f"{sys.executable} {tmp_path / 'engine.py'}", "PID": str(tmp_path / "pid"), "MODEL": "demo"}
    command = [sys.executable, str(DOCKER / "verify")]
    ended = subprocess.run(command, env=os.environ | PROXY | told, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "the log of the container" in ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("not as it should be: JSONDecodeError: ")
    assert "Traceback" not in ended.stderr
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


@pytest.mark.parametrize(("answer", "healthy"), [(say({"status": "ready"}), True), (say({}, 503), False)])
def test_the_health_check_asks_the_server_itself(answer: Answer, healthy: bool) -> None:
    file = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    (_, *arguments) = json.loads(re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", file, re.MULTILINE)[0])
    with scripted() as script:
        script.answer = answer
        port = script.base_url.rpartition(":")[2]
        environment = os.environ | PROXY | {"MASQUERADE_SERVE_PORT": port}
        ended = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)
    assert (ended.returncode == 0) == healthy
    assert script.path == "/readyz"
