"""A small world: a random two-layer model on disk, a store of masks, and the oracle on materialised weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from maskstore import BaseRef, Mask, MaskInfo, Registry, Store, encode, fingerprint, list_tensors

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>"]
SHAPE: dict[str, Any] = {  # of every family
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TIE = 1e-4  # a top-2 logit margin below this is a rounding tie; logits are some tens


def make_model(folder: Path, seed: int = 0, family: str = "llama", **changes: Any) -> Path:
    """Write a random model, with weights large enough that masks matter; every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    torch.manual_seed(seed)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **(SHAPE | tokens | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0 if "embed" in name else 8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_mask(
    model: Path, persona: str, share: float, seed: int, kinds: tuple[str, ...] = ("_proj",), **info: Any
) -> Mask:
    """Prune a random share of every Linear of a layer whose name ends with one of `kinds`."""
    rng = np.random.default_rng(seed)
    targets = {
        module: encode(rng.random(tuple(tensor.shape)) < share)
        for tensor in list_tensors(model)
        if (module := tensor.name.removesuffix(".weight")).endswith(kinds) and not tensor.name.endswith(".bias")
    }
    return Mask(BaseRef(fingerprint(model), "tiny"), targets, MaskInfo(persona, "random", **info))


def make_narrow(model: Path, persona: str, module: str, shape: tuple[int, int]) -> Mask:
    """Prune three weights of one module."""
    pruned = np.zeros(shape, bool)
    pruned[0, :3] = True
    return Mask(BaseRef(fingerprint(model), "tiny"), {module: encode(pruned)}, MaskInfo(persona, "made"))


def make_store(folder: Path, masks: Iterable[Mask]) -> Registry:
    """A store in which each mask is published under its persona's name."""
    Store(folder)
    registry = Registry(folder)
    for mask in masks:
        registry.publish(mask.info.persona, registry.store.add(mask))
    return registry


class Oracle:
    """Greedy tokens of one request alone: plain transformers, on weights that are W (M + gamma (1 - M))."""

    def __init__(self, model: Path, masks: Mapping[str, Mask], dtype: torch.dtype = torch.float32) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._masks = masks
        self._worn: dict[tuple[str | None, float], Any] = {}

    def wear(self, persona: str | None, gamma: float) -> Any:
        """The model of a persona at a gamma."""
        if (persona, gamma) not in self._worn:
            worn = copy.deepcopy(self._base)
            for name, target in self._masks[persona].targets.items() if persona else ():
                weight = worn.get_submodule(name).weight
                weight.data = torch.where(torch.from_numpy(target.to_keep()), weight, gamma * weight)
            self._worn[persona, gamma] = worn
        return self._worn[persona, gamma]

    @torch.no_grad()
    def speak(
        self, prompt: list[int], count: int, persona: str | None = None, gamma: float = 0.0, phase: str = "all"
    ) -> tuple[list[int], list[float]]:
        """So many greedy tokens, and the margin by which each one won."""
        worn, cache, ids = self.wear(persona, gamma), DynamicCache(), torch.tensor([prompt])
        if phase == "decode":
            self._base(ids[:, :-1], past_key_values=cache)
            ids = ids[:, -1:]
        tokens: list[int] = []
        margins: list[float] = []
        for _ in range(count):
            best = worn(ids, past_key_values=cache).logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            ids = torch.tensor([tokens[-1:]])
        return tokens, margins


def check(tokens: list[int], expected: tuple[list[int], list[float]]) -> None:
    """Tokens are the oracle's, up to the first rounding tie, after which nothing is claimed."""
    for place, (ours, theirs, margin) in enumerate(zip(tokens, *expected, strict=True)):
        if ours != theirs:
            assert margin < TIE, f"token {place} is {ours}, not {theirs}, which won by {margin}"
            return


def make_prompts(count: int, seed: int = 0, length: int = 24) -> list[list[int]]:
    """Random prompts of bytes, of different lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(len(SPECIAL), 256, length + 3 * n).tolist() for n in range(count)]
