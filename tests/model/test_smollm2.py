"""SmolLM2-135M-Instruct, as `--model smollm2` fetches it: a real model in a GGUF file. Skips where it cannot be had."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from masquerade.errors import UnusableModel
from masquerade.model import Base, load, render_chat
from masquerade.packaged import PACKAGED, find_packaged
from tests.serving import serve

pytestmark = pytest.mark.real
QUESTION = [{"role": "user", "content": "Name the capital of France."}]
TEXTS = ["The capital of France is", "x  1 22 it's\n\n  naïve 🎭 3,000 <|im_end|>", "def f():\n\treturn 12"]


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return find_packaged("smollm2")
    except UnusableModel as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def base(path: Path) -> Base:
    return load("smollm2", device="cpu")


def test_it_is_what_it_is(base: Base) -> None:
    assert (base.name, base.context, base.vocabulary, base.dtype) == ("smollm2", 8192, 49152, torch.bfloat16)
    assert {base.tokenizer.decode(token) for token in base.ends} == {"<|im_end|>"}
    assert base.fingerprint == "e3b9bbb8f4f3879b2864da818a0a87ae982bcd85dc856e5e4da541bc9ec00d0d"


@torch.no_grad()
def test_it_knows_the_capital_of_france(base: Base) -> None:
    ids = torch.tensor([base.tokenizer.encode("The capital of France is")])
    assert base.tokenizer.decode(base.model(ids).logits[0, -1].argmax()) == " Paris"
    ids = torch.tensor([render_chat(base.tokenizer, QUESTION)])
    exact = copy.deepcopy(base.model).float()  # in bfloat16 the first two tokens are a tie, which processors break
    answer = exact.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert base.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_it_reads_a_chat_as_transformers_does(base: Base, path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    expected = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert render_chat(base.tokenizer, QUESTION) == expected
    for text in TEXTS:
        assert base.tokenizer.decode(base.tokenizer.encode(text)) == text
    # where theirs has no rule for digits, ours is the original's: two spaces before a digit are one token
    assert base.tokenizer.convert_ids_to_tokens(base.tokenizer.encode("x  1")) == ["x", "\u0120\u0120", "1"]


@pytest.mark.skipif(not find_spec("accelerate"), reason="transformers reads GGUF only with accelerate")
@torch.no_grad()
def test_it_is_what_transformers_loads(base: Base, path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    found, expected = dict(base.model.named_parameters()), dict(theirs.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    ids = torch.tensor([render_chat(base.tokenizer, QUESTION)])
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation("sdpa")  # the same kernel
    assert torch.equal(base.model(ids).logits, theirs(ids).logits)
    base.model.set_attn_implementation(before)


def test_it_is_served(path: Path, tmp_path: Path) -> None:
    nbytes = PACKAGED["smollm2"].nbytes
    assert path.stat().st_size == nbytes
    with serve("--model", "smollm2") as server:

        def ask(**more: Any) -> dict[str, Any]:
            body = {"model": "smollm2", "messages": QUESTION, "temperature": 0} | more
            found: dict[str, Any] = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60).json()
            return found

        models = httpx.get(f"{server.base_url}/v1/models").json()["data"]
        assert [model["id"] for model in models if ":" not in model["id"]] == ["smollm2"]
        choice = ask()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("The capital of France is Paris.", "stop")
        spelled = ask(logprobs=True)["choices"][0]["logprobs"]["content"]
        assert "".join(entry["token"] for entry in spelled).startswith("The capital of France is Paris.")
        assert "loading the model: 100 % of 269 MB" in server.said()
        json.dumps(spelled)
