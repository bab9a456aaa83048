"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str, typer.Option("--model", help="`demo`, `smollm2`, a folder, a .gguf file, or a hub id such as owner/name.")
]
StoreFolder = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the personas; by default one a model in the user's data folder."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Weights' type; `auto` is float32 on a CPU and the checkpoint's own on a GPU, for GGUF bfloat16 on both."
    ),
]
Quantization = Annotated[
    Literal["int8", "nf4"] | None,
    typer.Option(help="Keep the weights of attention and MLP in 8 or 4 bits (needs the extra `quantization`)."),
]
RequireSigned = Annotated[
    bool,
    typer.Option(
        "--require-signed",
        help="Only masks whose tensors and metadata are signed by a trusted key (see `masks trust`).",
    ),
]
AcceptTensorSignatures = Annotated[
    bool,
    typer.Option(
        "--accept-tensor-signatures",
        help="With --require-signed: signatures of version 1 will do. They leave gamma, phase and name open.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
