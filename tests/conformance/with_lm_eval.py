"""EleutherAI's lm-evaluation-harness, with its `local-completions` model: tasks that need log probabilities."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import requests
from checks import Checks

os.environ["HF_HUB_OFFLINE"] = "1"
import lm_eval
from lm_eval.tasks import TaskManager

checks = Checks()
world = checks.world
MODEL = world["model"]
os.environ["OPENAI_API_KEY"] = world["admin"]
folder = Path(tempfile.mkdtemp(prefix="lm-eval-"))
QUESTIONS = 16

MULTIPLE_CHOICE = """
task: introverts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
PERPLEXITY = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""
GENERATION = """
task: replies
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""


def said(persona: str) -> list[tuple[str, str]]:
    """The held-out questions and answers of a persona."""
    lines = Path(world["data"], f"{persona}.heldout.jsonl").read_text().splitlines()
    messages = [json.loads(line)["messages"] for line in lines[:QUESTIONS]]
    return [(message[-2]["content"], message[-1]["content"]) for message in messages]


def write_tasks() -> None:
    """Tasks over questions that an introvert and an extravert answer; the introvert's answer counts."""
    pairs = list(zip(said("introvert"), said("extravert"), strict=True))
    lines = [{"question": shy[0], "choices": [shy[1], bold[1]], "label": 0} for shy, bold in pairs]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({**line, "text": " ".join(line["choices"])}) + "\n" for line in lines))
    for name, task in (("introverts", MULTIPLE_CHOICE), ("prose", PERPLEXITY), ("replies", GENERATION)):
        (folder / f"{name}.yaml").write_text(task % data)


def evaluate(task: str, model: str = MODEL, *, chat: bool = False, **options: Any) -> dict[str, Any]:
    """The results and samples of a task."""
    arguments = {
        "model": model,
        "base_url": f"{world['url']}/v1/completions",
        "tokenizer": world["tokenizer"],
        "tokenizer_backend": "huggingface",
        "max_length": 512,
        "max_retries": 1,
        **options,
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    return {"samples": found["samples"][task], **found["results"][task]}


def differ(samples: list[dict[str, Any]], model: str) -> float:
    """By how much the log probabilities of every choice differ from those of plain requests, at most."""
    pairs = [pair for sample in samples for pair in zip(sample["arguments"], sample["resps"], strict=True)]
    return max(abs(float(response[0][0]) - score(model, *argument)) for argument, response in pairs)


def score(model: str, prompt: str, answer: str) -> float:
    """The log probability of an answer, from one plain request. As the library does, spaces before it belong to it."""
    prompt, answer = prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer
    asked = {"model": model, "prompt": [prompt + answer, prompt], "echo": True, "logprobs": 0, "max_tokens": 0}
    key = {"Authorization": f"Bearer {world['admin']}"}
    response = requests.post(f"{world['url']}/v1/completions", json=asked, headers=key, timeout=60)
    both, before = (choice["logprobs"]["token_logprobs"] for choice in response.json()["choices"])
    return float(sum(both[len(before) :]))


@checks.check("loglikelihood")
def compare() -> None:
    """The log probabilities of every choice are those of plain requests, however they are sent."""
    for options in ({}, {"batch_size": 8}, {"num_concurrent": 4}, {"tokenized_requests": False}):
        difference = differ(evaluate("introverts", **options)["samples"], MODEL)
        assert difference < 1e-3, (options, difference)


@checks.check("persona")
def tell_apart() -> None:
    """Log probabilities are the persona's. The demo's introvert finds an introvert's answers likelier than others."""
    shy, bold = (evaluate("introverts", f"{MODEL}:{name}", chat=True) for name in ("introvert", "extravert"))
    assert differ(shy["samples"], f"{MODEL}:introvert") < 1e-3 < differ(shy["samples"], MODEL)
    if MODEL == "demo":
        assert shy["acc,none"] > bold["acc,none"] + 0.5, (shy["acc,none"], bold["acc,none"])


@checks.check("perplexity")
def roll() -> None:
    base, persona = (evaluate("prose", model)["word_perplexity,none"] for model in (MODEL, f"{MODEL}:introvert"))
    assert base > 1
    assert persona not in (base, float("inf"))


@checks.check("chat")
def generate() -> None:
    for sample in evaluate("replies", f"{MODEL}:introvert", chat=True)["samples"]:
        assert sample["resps"][0][0].strip()


write_tasks()
checks.run()
