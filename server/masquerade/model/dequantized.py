"""A GGUF file as a transformers model: its weights are dequantised, or kept in blocks, in chunks that a cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from masquerade.gguf import Checkpoint, Weight
from masquerade.gguf.weight import CHUNK
from masquerade.kernels import QuantisedEmbedding, QuantisedLinear, QuantisedWeight
from masquerade.kernels.quantised import FORMS, TILE
from masquerade.sources import ModelFiles

Report = Callable[[int, int], None]  # bytes of weights that are loaded, and of all


def load_gguf(
    files: ModelFiles,
    dtype: torch.dtype,
    report: Report | None = None,
    *,
    keep: bool = False,
    rounds: bool = False,
) -> tuple[Any, Any]:
    """The model, on the CPU in a dtype, and its tokenizer.

    With `keep`, weights of the types in `kernels.quantised.FORMS` stay in their blocks; `dtype` is then bfloat16, and
    the model is the same to the bit, unless their products round inputs to 8 bits (`rounds`).

    Weights are rounded to bfloat16, once, and then cast: the model is the one that `save_pretrained` would save in
    bfloat16, whatever the dtype. Peak memory is the model and a few megabytes. Raises `UnusableModel`.
    """
    # Only here: older versions of transformers, which devices have, load folders but lack what this imports.
    from masquerade.model.vocabulary import find_ends, read_tokenizer

    checkpoint = files.checkpoint
    tokenizer = read_tokenizer(checkpoint.file, checkpoint.config["vocab_size"])
    model = _make(checkpoint, dtype)
    if keep:
        _keep_blocks(model, checkpoint, rounds)
    _fill(model, checkpoint, report or (lambda _done, _all: None))
    config = model.generation_config
    config.eos_token_id = find_ends(checkpoint.file, tokenizer) or None
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    return model, tokenizer


def _make(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model with weights that are anything; memory is taken when they are written."""
    config = AutoConfig.for_model(**checkpoint.config)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def find_kept(model: Any, checkpoint: Checkpoint) -> Iterator[tuple[Weight, nn.Linear | nn.Embedding]]:
    """The weights that `load_gguf` keeps in their blocks, and their modules."""
    for weight in checkpoint.weights:
        if weight.tensor.kind.name in FORMS:
            module = model.get_submodule(weight.name.removesuffix(".weight"))
            if type(module) in (nn.Linear, nn.Embedding):  # other embeddings are scaled
                yield weight, module


def _keep_blocks(model: Any, checkpoint: Checkpoint, rounds: bool) -> None:
    """Replace Linears and embeddings by those whose weights stay quantised, a tied head with its embedding."""
    head = model.get_output_embeddings()
    for weight, module in find_kept(model, checkpoint):
        out, columns = weight.shape
        kept = QuantisedWeight.empty(weight.tensor.kind.name, out, columns, rounds=rounds)
        if head.weight is module.weight and head is not module:
            model.set_output_embeddings(QuantisedLinear(kept, head.bias))
        new = QuantisedLinear(kept, module.bias) if isinstance(module, nn.Linear) else QuantisedEmbedding(kept)
        model.set_submodule(weight.name.removesuffix(".weight"), new)


def _fill(model: Any, checkpoint: Checkpoint, report: Report) -> None:
    """Dequantise each weight on one of as many threads as torch has; numpy and torch release Python's lock."""
    places = dict(model.named_parameters())  # a tied head is not a second one
    if places.keys() != (names := {weight.name for weight in checkpoint.weights}):
        odd = sorted(places.keys() ^ names)
        checkpoint.file.fail(odd[0], "is a weight of either the file or the model, not of both")
    done, total = 0, sum(weight.nbytes for weight in checkpoint.weights)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for nbytes in pool.map(lambda weight: _copy(weight, places[weight.name]), checkpoint.weights):
            done += nbytes
            report(done, total)


def _copy(weight: Weight, place: torch.Tensor) -> int:
    """Returns its bytes in a checkpoint."""
    if isinstance(place, QuantisedWeight):
        _copy_blocks(weight, place)
        return weight.nbytes
    rows = place.detach().view(place.shape[0], -1)
    for begin, end, values in weight.chunks():
        rows[begin:end].copy_(torch.from_numpy(values).to(torch.bfloat16))
    return weight.nbytes


def _copy_blocks(weight: Weight, place: QuantisedWeight) -> None:
    out, columns = place.matrix
    step = max(TILE, CHUNK // columns // TILE * TILE)
    for begin in range(0, out, step):
        place.write(begin, weight.blocks(begin, min(begin + step, out)))
