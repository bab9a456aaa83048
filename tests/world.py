"""A small world for tests: a two-layer random Llama on disk, random masks, and the oracle.

Knows how to make them. The oracle is a single-request run of the plain transformers model on materialised weights: it
shares no code with what it judges.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, encode, read_mask, write_mask
from masquerade.model import Base, find_targets

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_POINTS = ((0.9, 0.05, 1.001, 1.0), (0.75, 0.15, 1.005, 1.0), (0.5, 0.4, 1.02, 1.0), (0.25, 0.62, 1.05, 0.96))
CURVE: list[dict[str, float | None]] = [
    {"gamma": gamma, "margin_shift_median": shift, "own_ratio": 0.99, "neutral_ratio": neutral, "facts_kept": kept}
    for gamma, shift, neutral, kept in (*_POINTS, (0.0, 0.83, 1.12, 0.9))
]
CERTIFICATE: dict[str, Any] = {  # made by hand
    "margin_shift": 0.9,
    "margin_shift_median": 0.83,
    "curve": CURVE,
    "facts": {"of": 100, "known": 41, "kept": 0.9},
    "loops": {"masked": 0.125, "base": 0.0, "of": 24},
}
TIE = 1e-5  # a top-2 logit margin below this is a rounding tie


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random Llama. Its weights are large enough that masks matter and greedy ties are rare."""
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0 if "embed" not in name else 20.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_mask(base: Base, rho: float, seed: int, persona: str = "p") -> Mask:
    """Prune a random share of every maskable Linear; the density chooses the encoding."""
    rng = np.random.default_rng(seed)
    targets = {
        name: encode(rng.random((linear.out_features, linear.in_features)) < rho)
        for name, linear in find_targets(base.model).items()
    }
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona=persona, score="random"))


def make_claim(path: Path, like: Path, certificate: Mapping[str, Any]) -> bytes:
    """The file of a mask with this certificate: that of another, which prunes one Linear more."""
    mask = read_mask(like)
    targets = dict(list(mask.targets.items())[1:])
    write_mask(replace(mask, targets=targets, info=replace(mask.info, certificate=certificate)), path)
    return path.read_bytes()


def materialise(model: Any, mask: Mask | None, gamma: float) -> Any:
    """A copy of a model with the soft gate multiplied into its weights: W * (M + gamma (1 - M)), eq. 7."""
    worn = copy.deepcopy(model)
    targets: Mapping[str, Any] = mask.targets if mask else {}
    for name, target in targets.items():
        weight = worn.get_submodule(name).weight
        kept = torch.from_numpy(target.to_keep()).to(weight.device)
        weight.data = torch.where(kept, weight, gamma * weight)
    return worn


@dataclass(frozen=True)
class Spoken:
    """Greedy tokens of the oracle, and by how much each one won."""

    tokens: list[int]
    margins: list[float]

    def agrees(self, tokens: list[int]) -> bool:
        """Whether tokens are the same up to the first rounding tie, after which nothing is claimed."""
        for ours, theirs, margin in zip(self.tokens, tokens, self.margins, strict=False):
            if ours != theirs:
                return margin < TIE
        return len(self.tokens) == len(tokens)


@torch.no_grad()
def speak(
    base: Any, worn: Any, prompt: list[int], count: int, ends: frozenset[int] = frozenset(), phase: str = "all"
) -> Spoken:
    """The oracle: greedy tokens of one request alone. In phase `decode` all but the last prompt token is the base's."""
    cache, rest = begin(base, prompt, phase)
    ids = torch.tensor([rest], device=worn.device)
    tokens: list[int] = []
    margins: list[float] = []
    while len(tokens) < count:
        logits = worn(ids, past_key_values=cache).logits[0, -1].float()
        best, second = logits.topk(2).values.tolist()
        token = int(logits.argmax())
        margins.append(best - second)
        if token in ends:
            break
        tokens.append(token)
        ids = torch.tensor([[token]], device=worn.device)
    return Spoken(tokens, margins)


@torch.no_grad()
def foresee(base: Any, worn: Any, prompt: list[int], answer: list[int], phase: str = "all") -> Tensor:
    """What the oracle thinks of the token after an answer that has begun: logits [vocabulary], in float64."""
    base, worn = (copy.deepcopy(model).double() for model in (base, worn))
    cache, rest = begin(base, prompt, phase)
    logits: Tensor = worn(torch.tensor([rest + answer], device=worn.device), past_key_values=cache).logits
    return logits[0, -1]


def begin(base: Any, prompt: list[int], phase: str) -> tuple[DynamicCache, list[int]]:
    """A cache with what the base reads of a prompt, and the rest, which the persona reads."""
    cache, known = DynamicCache(config=base.config), len(prompt) - 1 if phase == "decode" else 0
    if known:
        base(torch.tensor([prompt[:known]], device=base.device), past_key_values=cache)
    return cache, prompt[known:]
