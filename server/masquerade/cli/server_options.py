"""What a server is started with, wherever it runs: the options that `serve` and `ray deploy` share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

import typer

from masquerade.cli.options import (
    AcceptTensorSignatures,
    Database,
    Device,
    Dtype,
    Model,
    Quantization,
    RequireSigned,
    SplitLayers,
    StoreFolder,
)
from masquerade.errors import InvalidValue

_LONGEST_NAME = 128


@dataclass(frozen=True)
class ServerOptions:
    """Each field is an option of the command line, with its default."""

    model: Model = "demo"
    served_model_name: Annotated[
        str | None, typer.Option(help="Model id in the API; by default the name of the model's folder or file.")
    ] = None
    store: StoreFolder = None
    database: Database = None
    device: Device = "auto"
    split_layers: SplitLayers = 1
    dtype: Dtype = "auto"
    quantization: Quantization = None
    max_running: Annotated[int, typer.Option(help="Maximum number of requests in a batch.")] = 32
    max_waiting: Annotated[int, typer.Option(help="Maximum number of queued requests; above it, 429.")] = 256
    max_batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in one forward pass.")] = 512
    cache_bytes: Annotated[int, typer.Option(help="Maximum bytes of the KV cache.")] = 2**30
    speculate: Annotated[
        bool | None,
        typer.Option(
            "--speculate/--no-speculate",
            help="Draft answers from their own prompts, which changes no answer; by default on a CPU only.",
        ),
    ] = None
    mask_bytes: Annotated[int, typer.Option(min=1, help="Maximum bytes of masks on the device.")] = 2**30
    host_mask_bytes: Annotated[
        int | None,
        typer.Option(
            min=0, help="Maximum bytes of masks in host memory; by default 4 times --mask-bytes with a GPU, else 0."
        ),
    ] = None
    require_signed: RequireSigned = False
    accept_tensor_signatures: AcceptTensorSignatures = False
    accept_uncertified: Annotated[
        bool,
        typer.Option(
            "--accept-uncertified",
            help="On a quantised base: also serve personas that were not measured there (see `masks certify`).",
        ),
    ] = False
    insecure_no_auth: Annotated[
        bool,
        typer.Option(
            "--insecure-no-auth",
            help="Without keys, listen beyond this machine; anyone who reaches the server can use it.",
        ),
    ] = False
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Allow pages of this origin, such as https://chat.example; can be repeated."),
    ] = None
    key_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCOPE=FILE",
            help="A file with a key of this scope, such as admin=/run/secrets/admin-key; can be repeated.",
        ),
    ] = None
    answer_seconds: Annotated[float, typer.Option(min=1, help="Maximum seconds for the answers to a request.")] = 600
    response_days: Annotated[
        float, typer.Option(min=0, help="Days for which answers of /v1/responses are stored; 0 stores none.")
    ] = 30
    gateway_metrics: Annotated[
        bool,
        typer.Option(
            "--gateway-metrics",
            help="Serve what inference gateways route by: vLLM's metrics, load reports, OpenTelemetry's histograms.",
        ),
    ] = False
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Format of log lines.")] = "text"

    def __post_init__(self) -> None:
        name = self.served_model_name
        if name is not None and (not (0 < len(name) <= _LONGEST_NAME and name.isprintable()) or ":" in name):
            raise InvalidValue(
                f"--served-model-name must be 1 to {_LONGEST_NAME} printable characters without a colon, which "
                f"separates the persona; it is {name!r:.80}"
            )


def accept_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer with one more option for each field of `ServerOptions`, which it gets as `options`."""
    hints = get_type_hints(ServerOptions, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(one.name, kind, default=one.default, annotation=hints[one.name]) for one in _FIELDS]
    own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "options"]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {one.name: given.pop(one.name) for one in _FIELDS}
        command(options=ServerOptions(**values), **given)

    parameters = [*shared, *(one.replace(kind=kind) for one in own)]
    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


_FIELDS = fields(ServerOptions)
