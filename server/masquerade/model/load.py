"""Loads a base model: a named one, a local folder, a GGUF file or a hub model. Never runs a checkpoint's own code."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils.logging import set_tqdm_hook

from maskstore import list_tensors
from masquerade.errors import MasqueradeError, UnusableModel, quote
from masquerade.kernels import quantised
from masquerade.kernels.native import require_library
from masquerade.model import families
from masquerade.model.dequantized import Report, load_gguf
from masquerade.model.placement import find_stages, place
from masquerade.model.quantized import A8, adopt, check_stored, import_stored, quantize
from masquerade.model.short_attention import use_short_attention
from masquerade.model.targets import find_targets
from masquerade.ollama import PREFIX
from masquerade.sources import ModelFiles, find_model

# the weights of the language model in Gemma 3, Mistral 3 and Llama 4, which read images too
_TEXT_PART = {r"^(?:model\.)?language_model\.(?:model\.)?": "model.", r"^model\.lm_head\.": "lm_head."}
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_LOADING = "Loading weights"  # transformers' name of its progress bar


@dataclass(frozen=True)
class Base:
    """A loaded base model and its identity."""

    name: str  # the model id of the API
    path: Path  # a folder or a GGUF file
    fingerprint: str
    model: Any  # a transformers causal language model, in eval mode
    tokenizer: Any
    context: int  # most positions of a request
    ends: frozenset[int]  # token ids that end a generation
    quantization: str | None = None  # a name in `QUANTIZATIONS`, or `A8`; None for weights as the files have them

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, and so of inputs and outputs."""
        device: torch.device = self.model.device
        return device

    @property
    def devices(self) -> Sequence[torch.device]:
        """The devices that its layers are on, after the one of its inputs and outputs."""
        return [*dict.fromkeys([self.device, *(stage.device for stage in find_stages(self.model))])]

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def vocabulary(self) -> int:
        """Number of token ids with an embedding."""
        return int(self.model.config.vocab_size)


def load(
    name: str,
    *,
    device: str = "auto",
    split_layers: int = 1,
    dtype: str = "auto",
    quantization: str | None = None,
    keep_blocks: bool = False,
    report: Report | None = None,
) -> Base:
    """Load a named model, a folder, a GGUF file, or a hub id, ready for inference.

    `device` is `auto`, `cpu` or `cuda`; the decoder layers are divided among `split_layers` GPUs. `dtype` is `auto`
    (the checkpoint's, but float32 for a folder on a CPU), `float32`, `bfloat16` or `float16`; `quantization` is `A8` or
    a name in `QUANTIZATIONS`; `report` is told of the bytes that are loaded. With `keep_blocks` the weights of a GGUF
    file stay quantised where that is the same model to the bit and about as fast: on a CPU with bf16 products, in the
    dtype `auto`. Raises `UnusableModel` with the reason.
    """
    devices = _choose_devices(device, split_layers)
    where = devices[0]
    files, rounds = find_model(name), quantization == A8
    if rounds:
        _check_rounding(files, where.type, dtype)
    keep = rounds or (keep_blocks and keeps_blocks(where.type, dtype, quantization))
    try:
        mark = files.fingerprint()
        with _no_collections():
            model, tokenizer = (
                _load_gguf(files, dtype, report, keep=keep, rounds=rounds)
                if files.is_gguf
                else _load_folder(name, files, dtype, devices, report)
            )
    except MasqueradeError:
        raise
    except Exception as error:  # transformers checks a config in parts; a wrong one may raise anything
        raise UnusableModel(f"cannot load a model from {name!r}: {error}") from error
    if name.startswith(PREFIX) and not tokenizer.chat_template:
        raise UnusableModel(
            f"{name}: its GGUF has no chat template (tokenizer.chat_template), and Ollama's own template is not used; "
            f"`--model {files.path}` serves it without one, for `/v1/completions`"
        )
    if not find_targets(model):
        raise UnusableModel(f"{name!r} has no Linears that masks apply to; are its weights packed by a quantisation?")
    try:
        placement = place(model, devices, quantization)
    except ValueError as error:
        raise UnusableModel(f"`--quantization {quantization}`: {error}") from error
    if quantization and not rounds:
        quantize(model, quantization, placement.find)
    placement.apply(model)
    if where.type == "cpu":
        use_short_attention(model)
    return Base(
        name=files.name,
        path=files.path,
        fingerprint=mark,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        context=families.find_context(model.config),
        ends=_ends(model, tokenizer),
        quantization=quantization,
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep the garbage collector from running: a vocabulary starts it, and it walks through all modules for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _choose_devices(device: str, split_layers: int) -> list[torch.device]:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UnusableModel("`--device cuda`: torch sees no CUDA device; use `cpu` or `auto`")
    if split_layers == 1:
        return [torch.device("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")]
    if device == "cpu":
        raise UnusableModel(f"`--split-layers {split_layers}` divides the layers among GPUs; leave out `--device cpu`")
    if (found := torch.cuda.device_count()) < split_layers:
        raise UnusableModel(f"`--split-layers {split_layers}`: torch sees {found} CUDA devices")
    return [torch.device("cuda", number) for number in range(split_layers)]


def _load_folder(
    name: str, files: ModelFiles, dtype: str, devices: Sequence[torch.device], report: Report | None
) -> tuple[Any, Any]:
    wanted: Any = getattr(torch, dtype, dtype)
    if dtype == "auto" and devices[0].type == "cpu":
        wanted = torch.float32
    stored = _check_stored(files)
    if stored and len(devices) > 1:
        raise UnusableModel(
            f"`--split-layers {len(devices)}`: {name!r} is quantised in its files, which are loaded onto one GPU; take "
            "the unquantised checkpoint with --quantization"
        )
    config, renamed = read_config(name, files.path)
    place: Any = {"device_map": {"": devices[0]}} if stored else {}  # 8-bit weights cannot be moved afterwards
    with _follow_weights(report, files) if report else nullcontext():
        model, found = AutoModelForCausalLM.from_pretrained(
            files.path,
            config=config,
            key_mapping=renamed,
            dtype=wanted,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `found`
            **place,
        )
    if mismatched := sorted(found["mismatched_keys"]):
        weight, stored_shape, shape = mismatched[0]
        raise UnusableModel(
            f"cannot load a model from {name!r}: {weight} has the shape {list(stored_shape)} in its files, and "
            f"{list(shape)} by its config.json"
        )
    if missing := sorted(found["missing_keys"]):  # transformers makes random ones
        raise UnusableModel(f"cannot load a model from {name!r}: the weights of {quote(missing)} are missing")
    if stored:
        adopt(files.name, model)
    return model, AutoTokenizer.from_pretrained(files.path, local_files_only=True)


@contextmanager
def _follow_weights(report: Report, files: ModelFiles) -> Iterator[None]:
    """Report the weights that transformers loads in place of its progress bar, as if all were equally large."""
    total = sum(tensor.nbytes for tensor in list_tensors(files.path))

    def follow(make_bar: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return count(arguments[0]) if options.get("desc") == _LOADING else make_bar(*arguments, **options)

    def count(weights: Collection[Any]) -> Iterator[Any]:
        for done, weight in enumerate(weights, 1):
            yield weight
            report(total * done // len(weights), total)

    previous = set_tqdm_hook(follow)
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def _check_stored(files: ModelFiles) -> bool:
    """Whether bitsandbytes quantised the weights in the files. Raises `UnusableModel` for what cannot be loaded."""
    config, _ = PreTrainedConfig.get_config_dict(files.path, local_files_only=True)
    stored = check_stored(files.name, config, (tensor.name for tensor in list_tensors(files.path)))
    if stored:
        import_stored(files.name)
    return stored is not None


def read_config(name: str, folder: Path) -> tuple[Any, Mapping[str, str] | None]:
    """The config of a folder's language model, and where its weights have other names than the model's.

    Of a model of text and images it is the part for text. Raises `UnusableModel` for a family that is not supported.
    """
    if not (folder / _CONFIG).is_file():
        hint = (
            f"it has {_ADAPTER}, so it is an adapter: give its base"
            if (folder / _ADAPTER).is_file()
            else ("give the folder that transformers' save_pretrained has written, or a GGUF file")
        )
        raise UnusableModel(f"{name!r} has no {_CONFIG}; {hint}")
    model_type = str(PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        families.refuse(name, model_type)
    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    config: Any = whole.get_text_config(decoder=True)
    if config.model_type not in families.FAMILIES:
        families.refuse(name, model_type)
    if config is whole:
        return config, None
    config.tie_word_embeddings = whole.tie_word_embeddings
    return config, _TEXT_PART


def keeps_blocks(device: str, dtype: str, quantization: str | None) -> bool:
    """Whether `keep_blocks` leaves a GGUF file's weights quantised on a device (`cpu` or `cuda`)."""
    return device == "cpu" and dtype == "auto" and quantization is None and quantised.pays()


def _check_rounding(files: ModelFiles, device: str, dtype: str) -> None:
    """Raise `UnusableModel` if the inputs of a model's products cannot be rounded to 8 bits (`A8`)."""
    kinds = {weight.tensor.kind.name for weight in files.checkpoint.weights} if files.is_gguf else set()
    if not kinds & quantised.FORMS.keys():
        has = f"has {', '.join(sorted(kinds))}" if kinds else "is none"
        raise UnusableModel(
            f"`--quantization {A8}` needs a GGUF file with weights of the types {', '.join(quantised.FORMS)}; "
            f"{files.name} {has}"
        )
    if device != "cpu" or dtype not in ("auto", "bfloat16"):
        raise UnusableModel(f"`--quantization {A8}` runs on a CPU, in bfloat16; use `--device cpu` without `--dtype`")
    require_library()


def _load_gguf(files: ModelFiles, dtype: str, report: Report | None, *, keep: bool, rounds: bool) -> tuple[Any, Any]:
    """In bfloat16 unless told otherwise: dequantised weights are rounded to it, and float32 would only be larger."""
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return load_gguf(files, wanted, report, keep=keep, rounds=rounds)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = model.generation_config.eos_token_id
    if declared is None:
        declared = tokenizer.eos_token_id
    ends = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(isinstance(one, int) for one in ends):
        raise UnusableModel(f"the generation config's eos_token_id is {declared!r:.80}; it must be token ids")
    return frozenset(ends)
