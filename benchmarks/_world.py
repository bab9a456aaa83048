"""Bases to measure on: a random Llama of any size, with a tokenizer of as many words as it has tokens, and SmolLM2."""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from masquerade.errors import UnusableModel
from masquerade.model import Base, load

VOCABULARY = 8192


def write_base(folder: Path, shape: dict[str, int], dtype: torch.dtype = torch.float32) -> None:
    """Save a random Llama with grouped heads and tied embeddings to a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"num_key_value_heads": 4} | shape,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w3").save_pretrained(folder)


def make_base(shape: dict[str, int]) -> Base:
    """The same, loaded on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), shape)
        return load(folder, device="cpu")


def load_smollm2(*, keep_blocks: bool = False, quantization: str | None = None) -> Base:
    """SmolLM2 on the CPU, in bf16, as served or quantised; ends the process with the reason if it cannot be had."""
    try:
        return load("smollm2", device="cpu", keep_blocks=keep_blocks, quantization=quantization)
    except UnusableModel as error:
        sys.exit(f"{error}")
