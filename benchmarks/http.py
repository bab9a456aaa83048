"""What HTTP costs around the engine, against a bare uvicorn application that sends the same bytes.

`python -m benchmarks.http --json [--quick]`. The server runs in this process, its clients in another. Time is CPU time
of the whole process less that of the engine's thread, so that neither the model nor the load of the machine counts. A
request is a chat of a persona, answered with one token in one piece; a streamed token is what a longer stream costs
more than a short one. The bare application reads the body and sends prepared bytes, chunk by chunk at the pace of
the engine's steps. The two alternate, and the best turn of each counts. The model is random.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks.engine import TINY, make_base, make_mask
from maskstore import MaskInfo, Registry
from masquerade.app import create_app
from masquerade.engine import Engine
from masquerade.model import MaskManager, Residency, VerifiedStore
from masquerade.service.serving import Serving

ROUTE = "/v1/chat/completions"
CLIENTS = 8  # at once
SHORT = 2  # tokens of a short stream


@dataclass(frozen=True)
class Load:
    """The requests of one turn."""

    port: int
    body: bytes
    requests: int


def main() -> None:
    options = arguments(__doc__, "fewer requests; within a minute").parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    report("http", list(measure(*((60, 40, 3) if options.quick else (200, 200, 5)))), options.json)


def measure(requests: int, tokens: int, turns: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        serving = make_serving(Path(folder))
        bodies = {
            "request": body(serving.base.name, 1, stream=False),
            "short": body(serving.base.name, SHORT, stream=True),
            "long": body(serving.base.name, SHORT + tokens, stream=True),
        }
        with listen(create_app(serving)) as ours, listen(Bare()) as bare:
            thread = serving.engine._thread
            assert thread is not None
            assert thread.ident is not None
            clock = time.pthread_getcpuclockid(thread.ident)
            answers = {name: pool.submit(fetch, ours, content).result() for name, content in bodies.items()}
            prepare(answers)
            costs: dict[tuple[str, str], float] = {}
            for _ in range(turns):
                for name, content in bodies.items():
                    for side, port in (("ours", ours), ("bare", bare)):
                        load = Load(port, content, requests)
                        started = time.process_time() - time.clock_gettime(clock)
                        pool.submit(drive, load).result()
                        cost = (time.process_time() - time.clock_gettime(clock) - started) / requests
                        costs[side, name] = min(cost, costs.get((side, name), cost))
    per = {side: (costs[side, "long"] - costs[side, "short"]) / tokens for side in ("ours", "bare")}
    yield Figure("a request, outside of the engine", 1e3 * costs["ours", "request"], "CPU-ms", "<= 1.5")
    yield Figure("a request, bare application", 1e3 * costs["bare", "request"], "CPU-ms")
    yield Figure("a streamed token, outside of the engine", 1e3 * per["ours"], "CPU-ms", "<= 0.1")
    yield Figure("a streamed token, bare application", 1e3 * per["bare"], "CPU-ms")


def make_serving(folder: Path) -> Serving:
    base = make_base(TINY)
    base.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    manager, registry = MaskManager.attach(base.model), Registry(folder / "store")
    mask = replace(make_mask(base, 0), info=MaskInfo(persona="p", score="random"))
    registry.publish("p", registry.store.add(mask))
    residency = Residency(manager, VerifiedStore(registry.store, base.fingerprint), 2**24)
    return Serving(base, Engine(base), registry.store, registry, residency, manager)


def body(model: str, tokens: int, *, stream: bool) -> bytes:
    messages = [{"role": "user", "content": " ".join(f"w{number}" for number in range(400, 450))}]
    fields = {"model": f"{model}:p", "messages": messages, "max_tokens": tokens, "min_tokens": tokens, "seed": 1}
    return json.dumps({**fields, "stream": stream}).encode()


@contextmanager
def listen(app: Any) -> Iterator[int]:
    """Run a uvicorn server on a thread; yields its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


class Bare:
    """Reads a request and sends the bytes prepared for a body of its size."""

    def __init__(self) -> None:
        self.prepared = _PREPARED

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        content = b""
        while True:
            message = await receive()
            content += message["body"]
            if not message.get("more_body"):
                break
        kind, chunks = self.prepared[len(content)]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0.001)  # as between steps: chunks are written one by one
        await send({"type": "http.response.body", "body": b""})


_PREPARED: dict[int, tuple[bytes, list[bytes]]] = {}  # by size of the request


def prepare(answers: dict[str, tuple[int, bytes]]) -> None:
    """Record the server's answers for the bare application."""
    for name, (size, content) in answers.items():
        events = [event + b"\n\n" for event in content.split(b"\n\n") if event.startswith(b"data: ")]
        _PREPARED[size] = (b"application/json", [content]) if name == "request" else (b"text/event-stream", events)


def fetch(port: int, content: bytes) -> tuple[int, bytes]:
    """The size of a request, and the body of its answer."""
    return len(content), asyncio.run(_fetch(port, content))


async def _fetch(port: int, content: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = await _ask(reader, writer, content)
    writer.close()
    return answer


def drive(load: Load) -> None:
    """Send requests from several concurrent clients, each with its own connection."""

    async def client(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
        for _ in range(count):
            await _ask(reader, writer, load.body)
        writer.close()

    async def crowd() -> None:
        await asyncio.gather(*(client(load.requests // CLIENTS) for _ in range(CLIENTS)))

    asyncio.run(crowd())


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, content: bytes) -> bytes:
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + content)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert b" 200 " in answer.splitlines()[0], answer
    if b"content-length: " in answer:
        size = answer.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return await reader.readexactly(int(size))
    whole = b""
    while size := int(await reader.readline(), 16):
        whole += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return whole


if __name__ == "__main__":
    main()
