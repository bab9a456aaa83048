"""`masquerade serve`."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from masquerade.cli import keyfiles
from masquerade.cli.options import (
    AcceptTensorSignatures,
    Device,
    Dtype,
    Model,
    Quantization,
    RequireSigned,
    StoreFolder,
)
from masquerade.cli.progress import tell_quarters
from masquerade.cli.signals import end_when_told, reread_when_told
from masquerade.cli.stores import check_store, find_store, open_store
from masquerade.errors import CannotListen, InvalidValue

if TYPE_CHECKING:
    from masquerade.engine import Engine

_log = logging.getLogger("masquerade")
_LONGEST_NAME = 128

WRONG_KEY_SECONDS = 0.25  # a client that guesses makes four attempts a second on each connection


def serve(
    model: Model = "demo",
    served_model_name: Annotated[
        str | None, typer.Option(help="What the API calls the model; by default the name of its folder or file.")
    ] = None,
    store: StoreFolder = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_running: Annotated[int, typer.Option(help="Most requests in a batch.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Most requests in the queue; beyond it, 429.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens in one forward pass.")] = 512,
    cache_bytes: Annotated[int, typer.Option(help="Most bytes of keys and values.")] = 2**30,
    mask_bytes: Annotated[int, typer.Option(help="Most bytes of masks on the device.")] = 2**30,
    host_mask_bytes: Annotated[
        int | None,
        typer.Option(help="Most bytes of masks in host memory, beside a GPU; by default 4 times --mask-bytes, or 0."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="When told to stop, seconds for answers that have begun; the rest is cut off.")
    ] = 10.0,
    require_signed: RequireSigned = False,
    accept_tensor_signatures: AcceptTensorSignatures = False,
    insecure_no_auth: Annotated[
        bool,
        typer.Option(
            "--insecure-no-auth",
            help="Without keys, listen beyond this machine although anyone may then use the server.",
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Let pages of this origin, such as https://chat.example, use the server; may be repeated."),
    ] = None,
    key_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE=FILE",
            help="A file with a key of that scope, such as admin=/run/secrets/admin-key; may be repeated.",
        ),
    ] = None,
    answer_seconds: Annotated[float, typer.Option(min=1, help="Most seconds for the answers to a request.")] = 600,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="How lines of the log look.")] = "text",
) -> None:
    """Serve a model and its personas over OpenAI's API."""
    end_when_told()
    if served_model_name is not None:
        _check_model_name(served_model_name)
    root = find_store(store, model)
    check_store(root)
    keys = keyfiles.admit(root, key_file or ())
    reread_when_told(partial(_reread_keys, root, key_file or ()))

    import uvicorn

    from masquerade.app import create_app
    from masquerade.cli.draining import DrainingServer
    from masquerade.cli.loading import Loading
    from masquerade.engine import Engine, EngineConfig
    from masquerade.http import logs
    from masquerade.http.access import is_loopback
    from masquerade.http.limits import Policy, Protocol
    from masquerade.model import HostCache, MaskManager, Residency, VerifiedStore, load
    from masquerade.service.serving import Serving

    if not (keys or insecure_no_auth or is_loopback(host)):
        raise InvalidValue(
            f"{host} can be reached from other machines and the store has no keys; make one with `masquerade keys "
            "add`, use 127.0.0.1, or say --insecure-no-auth if something in front of the server checks who may enter"
        )
    policy = Policy(
        loopback=is_loopback(host) and not insecure_no_auth,
        cors_origins=tuple(cors_origin or ()),
        answer_seconds=answer_seconds,
        wrong_key_seconds=WRONG_KEY_SECONDS,
    )
    logs.configure(log_format)
    with _listen(host, port) as listener:
        config = EngineConfig(max_running, max_waiting, max_batch_tokens, cache_bytes)
        with Loading(listener):
            report = tell_quarters(lambda words: _log.info("%s", words))
            base = load(model, device=device, dtype=dtype, quantization=quantization, report=report)
            base = replace(base, name=served_model_name or base.name)
            personas, registry = open_store(
                root,
                base.name,
                base.fingerprint,
                require_signed=require_signed,
                accept_tensors=accept_tensor_signatures,
            )
            manager = MaskManager.attach(base.model)
            if host_mask_bytes is None:
                host_mask_bytes = 0 if base.device.type == "cpu" else 4 * mask_bytes
            verified_store = VerifiedStore(personas, base.fingerprint)
            residency = Residency(manager, verified_store, mask_bytes, HostCache(host_mask_bytes), max_waiting)
            serving = Serving(base, Engine(base, config), personas, registry, residency, manager)
            _warm_up(serving.engine)
        names = ", ".join(generation.name for generation in serving.personas())
        _log.info("%s on %s with the personas: %s", base.name, base.device, names or "none yet")
        _log_keys(keys)
        _log.info("listening on http://%s:%d", *listener.getsockname()[:2])
        app = create_app(serving, policy)
        running = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            timeout_graceful_shutdown=10,
            log_config=None,
            access_log=False,
            server_header=False,
        )
        server = DrainingServer(running, lambda: serving.engine.drain(drain_seconds))
        with _spare_collector():
            server.run(sockets=[listener])


@contextmanager
def _spare_collector() -> Iterator[None]:
    """Keep what is loaded out of garbage collection: to look through it takes 0.3 s, in which nobody is answered."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_model_name(name: str) -> None:
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()) or ":" in name:
        raise InvalidValue(
            f"--served-model-name must be 1 to {_LONGEST_NAME} printable characters without a colon, which comes "
            f"before a persona; not {name!r:.80}"
        )


def _reread_keys(root: Path, files: Sequence[str]) -> None:
    _log_keys(keyfiles.admit(root, files))


def _log_keys(count: int) -> None:
    _log.info("%d keys: %s", count, "each request needs one" if count else "whoever can reach the server may use it")


def _warm_up(engine: Engine) -> None:
    """One short answer, so that no client waits for what is made on first use; if it fails, the log says so."""
    from masquerade.engine import Request

    length = min(8, engine.base.context - 2)
    engine.generate([Request([0] * length, max_tokens=2, emit=lambda _: None)])


def _listen(host: str, port: int) -> socket.socket:
    """Take the address before anything slow is done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # asyncio sets this only on sockets made with the protocol number of TCP, and accepted connections inherit it.
    # Without it, the second write of an answer waits for the client's delayed acknowledgement, some 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
