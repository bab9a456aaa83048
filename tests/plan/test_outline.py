"""An outline is the model that would be loaded, and costs neither its download nor its memory."""

from __future__ import annotations

import json
import os
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from masquerade.errors import UnusableModel
from masquerade.model import find_targets, load
from masquerade.plan.outline import Outline, read_outline
from masquerade.sources import find_model
from tests import world
from tests.families import make_config
from tests.model import ggufs

EIGHT_BILLION = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PARAMETERS = 8_030_261_248  # of Llama 3 8B, as its makers count
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


def read(path: Path | str, device: str = "cpu", dtype: str = "auto") -> Outline:
    return read_outline(find_model(str(path), download=False), device, dtype)


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sparse(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file in bfloat16 with a whole header, and a hole where the values are."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_eight_billion_weights_are_planned_from_a_file_without_values(tmp_path: Path) -> None:
    write_config(tmp_path, **EIGHT_BILLION)
    outline = read(tmp_path)
    file = write_sparse(tmp_path, {name: tuple(one.shape) for name, one in outline.model.state_dict().items()})
    outline = read(tmp_path, "cuda")
    assert outline.parameters == PARAMETERS
    assert outline.files == {"BF16": 2 * PARAMETERS}
    assert os.stat(file).st_blocks * 512 < 2**20  # of 16 GB
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    assert (outline.dtype, outline.context, len(outline.linears)) == (torch.bfloat16, 131072, 224)


def test_the_config_alone_is_enough(tmp_path: Path) -> None:
    write_config(tmp_path, **EIGHT_BILLION)
    assert read(tmp_path).files == {}
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    outline = read(tmp_path)
    assert (outline.parameters, outline.files) == (PARAMETERS, {"index": 16})


def test_text_and_images_are_planned_as_they_are_loaded(tmp_path: Path) -> None:
    """The part for text, and as many positions as a request may have."""
    text = make_config("Gemma 3")
    config = Gemma3Config(text_config=text.to_dict(), vision_config={"hidden_size": 32, "num_hidden_layers": 1})
    config.save_pretrained(tmp_path / "images")
    text.save_pretrained(tmp_path / "text")
    both, alone = read(tmp_path / "images"), read(tmp_path / "text")
    assert (both.parameters, len(both.linears)) == (alone.parameters, len(alone.linears))
    make_config("Phi-4 mini").save_pretrained(tmp_path / "phi")
    longrope = read(tmp_path / "phi")
    assert longrope.context < longrope.model.config.max_position_embeddings


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    folder = world.make_model(tmp_path)
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UnusableModel, match=r"model\.safetensors.*the file has \d+ bytes"):
        read(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_counts_what_is_loaded(tmp_path: Path, family: str, tied: bool) -> None:
    config = AutoConfig.for_model(family, **ggufs.SHAPE, vocab_size=300, head_dim=16, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    outline = read(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert outline.parameters == sum(one.numel() for one in whole.parameters())
    shapes = [{name: one.weight.shape for name, one in find_targets(each).items()} for each in (outline.model, whole)]
    assert shapes[0] == shapes[1]
    assert sum(outline.files.values()) == sum(one.nbytes for one in model.parameters())


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_that_is_loaded(tmp_path: Path, dtype: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        folder = world.make_model(tmp_path / "folder")
    finally:
        torch.set_default_dtype(torch.float32)
    file = ggufs.write(tmp_path / "model.gguf", ggufs.make_model("llama"))
    for path in (folder, file.path):
        assert read(path, dtype=dtype).dtype == load(str(path), device="cpu", dtype=dtype).dtype
    assert read(folder, "cuda").dtype == torch.bfloat16


def test_a_gguf_has_the_outline_of_its_model(tmp_path: Path) -> None:
    model = ggufs.make_model("qwen3", tie_word_embeddings=True)
    file = ggufs.write(tmp_path / "model.gguf", model)
    outline = read(file.path)
    assert outline.parameters == sum(one.numel() for one in model.parameters())
    assert outline.config.model_type == "qwen3"
    assert sum(outline.files.values()) < file.path.stat().st_size
    assert not outline.is_mapped


def test_a_gguf_in_parts_has_the_outline_of_the_file(tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "model.gguf", ggufs.make_model("llama"), ggufs.quantise(ggufs.Kind.Q8_0)).path
    (tmp_path / "parts").mkdir()
    parts = ggufs.write_parts(file, 5, tmp_path / "parts")
    for path in (parts[0], parts[2], tmp_path / "parts"):
        outline = read(path)
        assert (outline.parameters, outline.files) == (read(file).parameters, read(file).files)


def test_only_weights_of_the_served_dtype_stay_in_the_file(tiny_folder: Path) -> None:
    assert read(tiny_folder).is_mapped
    assert not read(tiny_folder, dtype="bfloat16").is_mapped


def test_what_masks_do_not_apply_to_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="gpt2")
    with pytest.raises(UnusableModel, match="is a 'gpt2' model, which is not supported"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({**EIGHT_BILLION, "hidden_size": "many"}, "hidden_size"),
        ({**EIGHT_BILLION, "num_attention_heads": 0}, "cannot be read"),
        ({**EIGHT_BILLION, "intermediate_size": -1}, "cannot be read"),
        (
            {**EIGHT_BILLION, "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised with 'gptq' in its files",
        ),
    ],
)
def test_a_config_without_a_model_is_refused_with_the_reason(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnusableModel, match=message):
        read(write_config(tmp_path, **config))


def test_a_hub_model_is_read_from_the_cache_and_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UnusableModel, match=r"nothing is downloaded here; `hf download some/model config\.json`"):
        find_model("some/model", download=False)
    commit, cached = 40 * "a", tmp_path / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots").mkdir()
    write_config(cached / "snapshots" / commit, **EIGHT_BILLION)
    outline = read("some/model")
    assert (outline.name, outline.parameters) == ("some/model", PARAMETERS)


def test_a_packaged_model_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(UnusableModel, match="nothing is downloaded here"):
        find_model("smollm2", download=False)
    assert not list(tmp_path.iterdir())
