"""Options that several commands share, and output as `--json` asks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from masquerade.cli.stores import locate_store
from masquerade.database.url import DatabaseURL
from masquerade.errors import InvalidValue

if TYPE_CHECKING:
    from masquerade.database.postgresql import PostgreSQL

Model = Annotated[
    str,
    typer.Option(
        "--model", help="`demo`, `smollm2`, a folder, a .gguf file, ollama:NAME, or a hub id such as owner/name."
    ),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        parser=locate_store,
        metavar="FOLDER|s3://BUCKET/PREFIX",
        help="The personas: a folder, by default one per model in the user's data folder, or a bucket that machines "
        "share (needs the extra `s3`).",
    ),
]
Database = Annotated[
    DatabaseURL | None,
    typer.Option(
        "--database",
        metavar="URL",
        parser=DatabaseURL,
        envvar="MASQUERADE_DATABASE",
        help="PostgreSQL database for keys and jobs, postgresql://USER@HOST/NAME, which the servers of a store share; "
        "by default SQLite files in the store.",
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device of the model.")]
SplitLayers = Annotated[
    int, typer.Option(min=1, help="GPUs that the decoder layers are divided among, for a model too large for one.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Data type of the weights; `auto` is float32 on a CPU, the checkpoint's own on a GPU, bfloat16 for GGUF."
    ),
]
Quantization = Annotated[
    Literal["int8", "nf4", "fp4", "a8"] | None,
    typer.Option(
        help="Quantise the weights of attention and MLP to 8 or 4 bits (needs the extra `quantization`); `a8` keeps a "
        "GGUF file's weights in its blocks and rounds what they are multiplied with to 8 bits, on a CPU."
    ),
]
RequireSigned = Annotated[
    bool,
    typer.Option(
        "--require-signed",
        help="Accept only masks whose tensors and metadata are signed by a trusted key (see `masks trust`).",
    ),
]
AcceptTensorSignatures = Annotated[
    bool,
    typer.Option(
        "--accept-tensor-signatures",
        help="With --require-signed: also accept signatures of version 1, which do not cover gamma, phase and name.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only one JSON object on stdout.")]


def open_database(url: DatabaseURL | None) -> PostgreSQL | None:
    """The database of an option, if one is given."""
    if url is None:
        return None
    from masquerade.database.postgresql import PostgreSQL

    return PostgreSQL(url)


def require_ray() -> None:
    """Raise `InvalidValue` if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InvalidValue("this needs Ray; install it with pip install 'masquerade[ray]'")


def say(as_json: bool, result: Mapping[str, Any], text: str | Table) -> None:
    """Print one JSON object, or a text or table."""
    if as_json:
        print(json.dumps(result))
    elif isinstance(text, str):
        print(text)
    else:
        Console().print(text)
