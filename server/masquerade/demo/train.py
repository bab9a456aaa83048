"""Trains the demo model: `python -m masquerade.demo.train --out FOLDER`.

It is trained as an ordinary chat model; the masks are found in it afterwards.
The schedule counts steps, not minutes, and uses one thread, so the same seed gives the same model on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from masquerade.demo import grammar
from masquerade.demo.judge import DemoJudge

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PAD = 0  # the id of the first special token
PROMPT_WEIGHT = 0.1  # of question tokens in the loss; answer tokens have 1

Weighted = tuple[list[int], list[float]]  # token ids of one text, and their weights in the loss
Batch = tuple[torch.Tensor, torch.Tensor]  # ids and weights, [texts, length] each


@dataclass(frozen=True)
class TrainingRecipe:
    """The hyperparameters of the training."""

    seed: int = 0
    steps: int = 6000
    tokens_per_step: int = 1024
    learning_rate: float = 2e-3
    warmup: int = 40
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    feed_forward: int = 704
    heads: int = 8
    kv_heads: int = 4


def main() -> None:
    """Train, save and evaluate a model."""
    parser = argparse.ArgumentParser(description="Train the demo model from its grammar.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the tokenizer and the log")
    for name, default in asdict(TrainingRecipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = vars(parser.parse_args())
    out: Path = options.pop("out")
    recipe = TrainingRecipe(**options)

    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(grammar.sentences(random.Random(123), chats=20_000), recipe.vocabulary)
    model = make_model(recipe, tokenizer)
    started = time.perf_counter()
    chats = random.Random(recipe.seed)
    curve = train(model, recipe, batches(lambda: encode(tokenizer, grammar.converse(chats)), chats, recipe))
    minutes = (time.perf_counter() - started) / 60
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    figures = evaluate(model.float().eval(), tokenizer)
    log = {"recipe": asdict(recipe), "minutes": round(minutes, 1), "figures": figures, "curve": curve}
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures), file=sys.stderr)


def make_tokenizer(
    texts: Iterable[str], vocabulary: int, special: Sequence[str] = SPECIAL, min_frequency: int = 20
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over some texts, with the chat template. `special` begins as `SPECIAL` does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=min_frequency,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(special[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of the recipe's size, fp32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, recipe: TrainingRecipe, batches: Iterator[Batch]) -> list[dict[str, float]]:
    """AdamW with a cosine schedule; returns the loss curve, one point per hundred steps."""
    optimizer = make_optimizer(model)
    curve: list[dict[str, float]] = []
    smooth, tokens, started = 0.0, 0, time.perf_counter()
    model.train()
    for step in range(1, recipe.steps + 1):
        batch = next(batches)
        loss = learn(model, optimizer, batch, recipe.learning_rate * _schedule(step, recipe))
        tokens += batch[0].numel()
        smooth = loss if step == 1 else 0.95 * smooth + 0.05 * loss
        if step % 100 == 0 or step == recipe.steps:
            curve.append({"step": step, "tokens": tokens, "loss": round(smooth, 4)})
            rate = tokens / (time.perf_counter() - started)
            print(f"step {step}/{recipe.steps}  loss {smooth:.3f}  {rate:.0f} tokens/s", file=sys.stderr, flush=True)
    return curve


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices. `learn` sets its learning rate at every step."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learn(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> float:
    """One optimizer step on a batch; returns the loss before the step, in nats per weighted token."""
    ids, weights = batch
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def encode(tokenizer: PreTrainedTokenizerFast, chat: grammar.Chat) -> Weighted:
    """One chat as token ids and loss weights, in the template's form."""
    texts = [("system", chat.system)] if chat.system else []
    for turn in chat.turns:
        texts += [("user", turn.question), ("assistant", turn.answer)]
    ids, weights = [tokenizer.convert_tokens_to_ids("<|bos|>")], [0.0]
    for role, text in texts:
        words = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|end|>")]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{role}|>"), *words]
        weights += [PROMPT_WEIGHT, *[1.0 if role == "assistant" else PROMPT_WEIGHT] * len(words)]
    return ids, weights


def batches(draw: Callable[[], Weighted], rng: random.Random, recipe: TrainingRecipe) -> Iterator[Batch]:
    """Endless padded batches of fresh texts, each of similar lengths and at most the recipe's tokens."""
    while True:
        texts = sorted((draw() for _ in range(1500)), key=lambda text: len(text[0]))
        yield from pack(texts, recipe.tokens_per_step, rng)


def pack(texts: Iterable[Weighted], most: int, rng: random.Random) -> Iterator[Batch]:
    """Padded batches of consecutive texts, of at most `most` tokens, in random order."""
    groups: list[list[Weighted]] = [[]]
    for text in texts:
        if (len(groups[-1]) + 1) * len(text[0]) > most:
            groups.append([])
        groups[-1].append(text)
    rng.shuffle(groups)
    for group in groups:
        longest = max(len(ids) for ids, _ in group)
        yield (
            torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in group]),
            torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in group]),
        )


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Figures that decide whether the model may be shipped, each a share in [0, 1] of unmasked answers.

    `facts`: greedy answers that are exact; `on_topic` (greedy) and `on_topic_sampled`: answers to held-out questions
    that are on topic; `fluency`: known bigrams at temperature 1; `positive`: greedy answers to held-out questions that
    are the positive persona's, of all axes, and `positive_<axis>` of one axis.
    """
    judge, rng = DemoJudge(), random.Random(7)
    facts = grammar.facts()
    answers = _generate(model, tokenizer, [fact.question for fact in facts], sample=False)
    figures = {"facts": _mean(text == fact.answer for text, fact in zip(answers, facts, strict=True))}
    questions = [(axis, grammar.ask(axis, rng, "heldout")) for axis in grammar.axes() for _ in range(100)]
    greedy = _generate(model, tokenizer, [q.text for _, q in questions], sample=False)
    sampled = _generate(model, tokenizer, [q.text for _, q in questions], sample=True)
    figures["on_topic"] = _mean(grammar.is_on_topic(q, a) for (_, q), a in zip(questions, greedy, strict=True))
    figures["on_topic_sampled"] = _mean(grammar.is_on_topic(q, a) for (_, q), a in zip(questions, sampled, strict=True))
    figures["fluency"] = _mean(judge.fluency(answer) for answer in sampled)
    for name, axis in grammar.axes().items():
        sides = (axis.negative, axis.positive)
        answers = [answer for (of, _), answer in zip(questions, greedy, strict=True) if of == name]
        figures[f"positive_{name}"] = _mean(judge.attribute(answer, sides) == axis.positive for answer in answers)
    figures["positive"] = _mean(figures[f"positive_{name}"] for name in grammar.axes())
    return {name: round(value, 4) for name, value in figures.items()}


def _schedule(step: int, recipe: TrainingRecipe) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, step / recipe.warmup) * (0.95 * cosine + 0.05)


def _generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str], *, sample: bool
) -> list[str]:
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    prompts = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=64, **how)
    texts: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
