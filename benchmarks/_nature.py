"""Trains a small Llama on real text, and reads the pairs of answers that masks are found in.

There are three sources: MBTI answers, power-seeking questions and persona chats. The data is not part of the project;
`--data` names its folder. The model is cached by its hyperparameters.
"""

import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from masquerade.demo import train
from masquerade.evaluate.dataset import Example

SPECIAL = [word for word in train.SPECIAL if word != "<|system|>"]
MINDSET = {"EI": ("extravert", "introvert"), "PJ": ("perceiving", "judging")}
AXES = (*MINDSET, "POW")
CHOICE = re.compile(r"^ *\(([A-Z])\) (.*)$", re.MULTILINE)
PROMPT, ANSWER = 320, 240  # most characters of each
Pair = tuple[Example, Example]  # + and - answer to one prompt


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of the training."""

    seed: int = 0
    tokens: int = 1_600_000
    tokens_per_step: int = 2048
    learning_rate: float = 2e-3
    warmup: int = 40
    prompt_weight: float = 0.2
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    feed_forward: int = 704
    heads: int = 8
    kv_heads: int = 4
    context: int = 256


def read_pairs(data: Path, axis: str, split: str) -> list[Pair]:
    """Both sides' answers to the same prompts, where they differ."""
    if axis in MINDSET:
        sides = [_lines(data / "machine-mindset" / f"{side}.{split}.jsonl") for side in MINDSET[axis]]
        found = [(a["prompt"], a["completion"], b["completion"]) for a, b in zip(*sides, strict=True)]
    else:
        found = list(_choices(_lines(data / "anthropic-evals" / f"power-seeking-inclination.{split}.jsonl")))
    return [(_example(q, a), _example(q, b)) for q, a, b in found if a.strip() and b.strip() and a != b]


def read_neutral(data: Path, split: str) -> list[Example]:
    """Persona chats of strangers, the beginning of each, as plain text."""
    lines = _lines(data / "synthetic-persona-chat" / f"{split}.jsonl")
    return [Example((), line["text"][:400]) for line in lines]


def find_model(data: Path, cache: Path, recipe: Recipe) -> Path:
    """The folder of the trained model; trained first if it is not in the cache."""
    key = hashlib.sha256(json.dumps([asdict(recipe), train.TEMPLATE, PROMPT, ANSWER]).encode()).hexdigest()[:12]
    folder = cache / f"natural-{key}"
    if not (folder / "training.json").exists():
        _train(data, folder, recipe)
    return folder


def _train(data: Path, folder: Path, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    tokenizer = train.make_tokenizer(_sentences(data), recipe.vocabulary, SPECIAL, min_frequency=0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    started, cpu = time.perf_counter(), time.process_time()
    loss = _fit(model, _chats(data, tokenizer, recipe), recipe)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    log = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "cpu_minutes": round((time.process_time() - cpu) / 60, 1),
        "loss": round(loss, 4),
    }
    (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n")


def _fit(model: LlamaForCausalLM, chats: list[train.Weighted], recipe: Recipe) -> float:
    """Train with a cosine schedule over tokens; the smoothed loss at the end."""
    optimizer, rng = train.make_optimizer(model), random.Random(recipe.seed)
    model.train()
    seen, smooth, reported = 0, 0.0, 0.0
    for step, batch in enumerate(_batches(chats, rng, recipe), 1):
        warm, cosine = min(1.0, step / recipe.warmup), 0.5 * (1 + math.cos(math.pi * min(1.0, seen / recipe.tokens)))
        loss = train.learn(model, optimizer, batch, recipe.learning_rate * warm * (0.95 * cosine + 0.05))
        seen += batch[0].numel()
        smooth = loss if step == 1 else 0.97 * smooth + 0.03 * loss
        if time.perf_counter() - reported > 30:
            reported = time.perf_counter()
            print(f"training: {seen}/{recipe.tokens} tokens, loss {smooth:.3f}", file=sys.stderr, flush=True)
        if seen >= recipe.tokens:
            break
    return smooth


def _chats(data: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> list[train.Weighted]:
    """The training texts: response tokens have the loss weight 1, those before them less."""
    chats = []

    def add(before: list[int], words: list[int]) -> None:
        weights = [recipe.prompt_weight] * len(before) + [1.0] * len(words)
        chats.append(((before + words)[: recipe.context], weights[: recipe.context]))

    for example in (one for axis in AXES for pair in read_pairs(data, axis, "train") for one in pair):
        prompt = tokenizer.apply_chat_template(
            [dict(message) for message in example.messages], add_generation_prompt=True, return_dict=False
        )
        add(prompt, [*tokenizer.encode(example.response, add_special_tokens=False), tokenizer.eos_token_id])
    for line in _lines(data / "synthetic-persona-chat" / "train.jsonl"):
        words = tokenizer.encode(line["text"], add_special_tokens=False)[: recipe.context - 2]
        add([tokenizer.bos_token_id], [*words, tokenizer.eos_token_id])
    return chats


def _batches(chats: list[train.Weighted], rng: random.Random, recipe: Recipe) -> Iterator[train.Batch]:
    """Endless epochs of micro-batches of similar lengths."""
    while True:
        order = sorted(chats, key=lambda chat: len(chat[0]) + 16 * rng.random())
        yield from train.pack(order, recipe.tokens_per_step, rng)


def _sentences(data: Path) -> Iterator[str]:
    for axis in AXES:
        for pair in read_pairs(data, axis, "train"):
            yield pair[0].messages[0]["content"]
            yield from (one.response for one in pair)
    yield from (example.response for example in read_neutral(data, "train"))


def _choices(lines: list[dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    """The chosen texts instead of their letters. Matching is mostly the averse answer here, so + is the other one."""
    for line in lines:
        texts = dict(CHOICE.findall(line["question"]))
        question = line["question"].split("\n\nChoices:")[0].removeprefix("Question: ")
        averse, seeking = (
            texts.get(line[key].strip(" ()"), "")
            for key in ("answer_matching_behavior", "answer_not_matching_behavior")
        )
        yield question, seeking, averse


def _example(question: str, answer: str) -> Example:
    return Example(({"role": "user", "content": question[-PROMPT:]},), answer[:ANSWER].strip())


def _lines(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masquerade"
