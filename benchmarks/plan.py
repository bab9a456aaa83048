"""What a server takes beside what `masquerade plan` counts: the memory of the process itself.

`python -m benchmarks.plan --json [--model M --dtype D]`. The server answers three chats of 40 tokens on the base; then
its resident memory, as Linux reports it, is compared with its weights. The chats take few megabytes of the KV cache,
whose other blocks take none.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks._report import Figure, arguments, report
from masquerade.plan.fit import PROCESS
from masquerade.plan.footprint import measure_weights
from masquerade.plan.outline import read_outline
from masquerade.sources import find_model
from tests.serving import serve

CHATS, TOKENS, MIB = 3, 40, 2**20


def main() -> None:
    parser = arguments(__doc__, "one chat")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    report("plan", list(measure(options.model, options.dtype, 1 if options.quick else CHATS)), options.json)


def measure(model: str, dtype: str, chats: int) -> Iterator[Figure]:
    outline = read_outline(find_model(model), "cpu", dtype)
    weights = measure_weights(outline, outline.dtype)
    with serve("--model", model, "--device", "cpu", "--dtype", dtype) as server:
        for _ in range(chats):
            chat(server.base_url, outline.name)
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    resident = 1024 * int(found[1])
    for name, nbytes, reach in (
        ("resident", resident, None),
        ("weights", weights, None),
        ("the process: what is left", resident - weights, f"<= {PROCESS / MIB:g}"),
    ):
        yield Figure(name, nbytes / MIB, "MiB", reach)


def chat(base_url: str, name: str) -> None:
    body = {"model": name, "messages": [{"role": "user", "content": "How are you?"}], "max_tokens": TOKENS}
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        response.read()


if __name__ == "__main__":
    main()
