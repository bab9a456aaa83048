"""`masquerade serve`: load a model and answer HTTP requests until a signal arrives."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace
from typing import Annotated, Literal

import typer

from maskstore import mirror
from masquerade.cli import heap, keyfiles
from masquerade.cli.options import (
    AcceptTensorSignatures,
    Database,
    Device,
    Dtype,
    Model,
    Quantization,
    RequireSigned,
    StoreFolder,
    open_database,
)
from masquerade.cli.plan import announce
from masquerade.cli.progress import hide_loading_bars, report_quarters
from masquerade.cli.signals import exit_on_sigterm, run_on_sighup
from masquerade.cli.stores import check_keys, check_store, find_store, open_store
from masquerade.errors import CannotListen, InvalidValue

_log = logging.getLogger("masquerade")
_LONGEST_NAME = 128

WRONG_KEY_SECONDS = 0.25  # limits a client that guesses keys to four attempts a second per connection


def serve(
    model: Model = "demo",
    served_model_name: Annotated[
        str | None, typer.Option(help="Model id in the API; by default the name of the model's folder or file.")
    ] = None,
    store: StoreFolder = None,
    database: Database = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free one.")] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_running: Annotated[int, typer.Option(help="Maximum number of requests in a batch.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Maximum number of queued requests; above it, 429.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in one forward pass.")] = 512,
    cache_bytes: Annotated[int, typer.Option(help="Maximum bytes of the KV cache.")] = 2**30,
    speculate: Annotated[
        bool | None,
        typer.Option(
            "--speculate/--no-speculate",
            help="Draft answers from their own prompts, which changes no answer; by default on a CPU only.",
        ),
    ] = None,
    mask_bytes: Annotated[int, typer.Option(help="Maximum bytes of masks on the device.")] = 2**30,
    host_mask_bytes: Annotated[
        int | None,
        typer.Option(help="Maximum bytes of masks in host memory; by default 4 times --mask-bytes with a GPU, else 0."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, seconds for running answers to complete.")
    ] = 10.0,
    require_signed: RequireSigned = False,
    accept_tensor_signatures: AcceptTensorSignatures = False,
    accept_uncertified: Annotated[
        bool,
        typer.Option(
            "--accept-uncertified",
            help="On a quantised base: also serve personas that were not measured there (see `masks certify`).",
        ),
    ] = False,
    insecure_no_auth: Annotated[
        bool,
        typer.Option(
            "--insecure-no-auth",
            help="Without keys, listen beyond this machine; anyone who reaches the server can use it.",
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Allow pages of this origin, such as https://chat.example; can be repeated."),
    ] = None,
    key_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE=FILE",
            help="A file with a key of this scope, such as admin=/run/secrets/admin-key; can be repeated.",
        ),
    ] = None,
    answer_seconds: Annotated[float, typer.Option(min=1, help="Maximum seconds for the answers to a request.")] = 600,
    response_days: Annotated[
        float, typer.Option(min=0, help="Days for which answers of /v1/responses are stored; 0 stores none.")
    ] = 30,
    gateway_metrics: Annotated[
        bool,
        typer.Option(
            "--gateway-metrics",
            help="Serve what inference gateways route by: vLLM's metrics, load reports, OpenTelemetry's histograms.",
        ),
    ] = False,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Format of log lines.")] = "text",
) -> None:
    """Serve a model and its personas over OpenAI's API."""
    exit_on_sigterm()
    if served_model_name is not None:
        _check_model_name(served_model_name)
    root = find_store(store, model)
    check_store(root)
    tables = open_database(database)
    if tables:
        check_keys(root, tables)
    keys = keyfiles.add_missing(root, key_file or (), tables)
    run_on_sighup(lambda: _log_keys(keyfiles.add_missing(root, key_file or (), tables)))

    # FastAPI, which the checks before need not
    from masquerade.cli.loading import Loading
    from masquerade.http import logs
    from masquerade.http.limits import Policy, is_loopback

    if not (keys or insecure_no_auth or is_loopback(host)):
        raise InvalidValue(
            f"{host} can be reached from other machines and the store has no keys; make one with `masquerade keys "
            "add`, use 127.0.0.1, or give --insecure-no-auth if a proxy in front of the server authenticates clients"
        )
    policy = Policy(
        loopback=is_loopback(host) and not insecure_no_auth,
        cors_origins=tuple(cors_origin or ()),
        answer_seconds=answer_seconds,
        wrong_key_seconds=WRONG_KEY_SECONDS,
        response_days=response_days,
        gateway_metrics=gateway_metrics,
    )
    logs.configure(log_format)
    with _listen(host, port) as listener:
        with Loading(listener):
            with heap.importing():  # clients are answered while these are imported
                from masquerade.cli import server
                from masquerade.engine import EngineConfig
                from masquerade.model import load
            hide_loading_bars()
            config = EngineConfig(max_running, max_waiting, max_batch_tokens, cache_bytes, speculate=speculate)
            announce(model, device, dtype, config, mask_bytes, quantization)
            report = report_quarters(lambda line: _log.info("%s", line))
            base = load(model, device=device, dtype=dtype, quantization=quantization, keep_blocks=True, report=report)
            base = replace(base, name=served_model_name or base.name)
            store_and_registry = open_store(
                root,
                base.name,
                base.fingerprint,
                require_signed=require_signed,
                accept_tensors=accept_tensor_signatures,
            )
            if url := mirror.find_url(root):
                _log.info("personas are in %s; %s has this machine's copy, keys and jobs", url, root)
            serving = server.assemble(
                base, config, *store_and_registry, mask_bytes, host_mask_bytes, accept_uncertified=accept_uncertified
            )
        server.log_personas(serving)
        _log_keys(keys)
        _log.info("listening on http://%s:%d", *listener.getsockname()[:2])
        draining_server = server.make_server(serving, policy, drain_seconds, tables)
        heap.freeze()
        draining_server.run(sockets=[listener])


def _check_model_name(name: str) -> None:
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()) or ":" in name:
        raise InvalidValue(
            f"--served-model-name must be 1 to {_LONGEST_NAME} printable characters without a colon, which separates "
            f"the persona; it is {name!r:.80}"
        )


def _log_keys(count: int) -> None:
    access = "each request needs one" if count else "anyone who can reach the server can use it"
    _log.info("%d keys: %s", count, access)


def _listen(host: str, port: int) -> socket.socket:
    """Bind the socket before the model is loaded, so that a port in use fails at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    # asyncio sets this only on sockets made with the protocol number of TCP, and accepted connections inherit it.
    # Without it, the second write of an answer waits about 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
