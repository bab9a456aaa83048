"""Every family of models, served and built as a small random model: what docs/bases.md says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Llama4Config,
    Mistral3Config,
)

from maskstore import BaseRef, Mask, MaskInfo, MaskMismatch, Registry
from maskstore import encode as encode_target
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.errors import BuildFailed, UnusableModel
from masquerade.evaluate.dataset import Encoded, Example, batches
from masquerade.evaluate.metrics import likelihoods
from masquerade.model import FAMILIES as SUPPORTED
from masquerade.model import AppliedMask, Base, MaskManager, find_targets, load
from masquerade.pruning import Builder, PersonaExamples, Recipe, Scratch, certificate
from masquerade.pruning.collector import CalibrationText, StatisticsCollector
from masquerade.pruning.layerwise import LayerwiseModel
from masquerade.pruning.responses import ResponseBatch
from masquerade.pruning.search import SearchSettings
from masquerade.pruning.statistics import LinearStatistics
from tests import families, world
from tests.engine.asking import Listener, finish
from tests.model.test_quantized import TOLERANCE, check_logits, check_tokens

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
FUSED = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
LLAMA4 = {"feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"}
TARGETS: Mapping[str, set[str]] = {  # where they are not those of a Llama
    "Llama 4": ATTENTION | LLAMA4,
    "Llama 4 MoE": ATTENTION | LLAMA4 | {name.replace(".", ".shared_expert.") for name in LLAMA4},
    "Mixtral": ATTENTION,
    "Qwen MoE": ATTENTION | MLP | {name.replace(".", ".shared_expert.") for name in MLP},
    "Qwen3 MoE": ATTENTION,
    "Phi-2": ATTENTION - {"self_attn.o_proj"} | {"self_attn.dense", "mlp.fc1", "mlp.fc2"},
    "Phi-3": FUSED,
    "Phi-4 mini": FUSED,
    "Granite MoE": ATTENTION,
    "Granite MoE with a shared expert": ATTENTION | {"shared_mlp.input_linear", "shared_mlp.output_linear"},
    "OLMoE": ATTENTION,
    "GLM-4": ATTENTION | {"mlp.gate_up_proj", "mlp.down_proj"},
    "Apertus": ATTENTION | {"mlp.up_proj", "mlp.down_proj"},
    "StarCoder2": ATTENTION | {"mlp.c_fc", "mlp.c_proj"},
    "gpt-oss": ATTENTION,
}
EXPERTS = [name for name, (_, changes) in families.FAMILIES.items() if families.has_experts(changes)]
PROMPTS = [[(7 * place + place**2) % 250 + 6 for place in range(start, start + n)] for start, n in ((0, 90), (5, 20))]
COUNT = 12
WIDER = {"intermediate_size": 64, "intermediate_size_mlp": 64}  # no row of 48 is kept in 4 bits
TEXTS = [  # prompt and response; the first is longer than every window
    Encoded(tuple(PROMPTS[0][:40]), (40, 50, 60, 2)),
    Encoded((1, 9), (8, 7, 6, 2)),
    Encoded((1,), (60, 61, 2)),
]


@dataclass(frozen=True)
class Family:
    """A family's name and the folder of its model."""

    name: str
    folder: Path


@pytest.fixture(scope="module", params=families.FAMILIES, ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, families.make_family(tmp_path_factory.mktemp("family"), request.param))


@pytest.fixture
def base(family: Family) -> Base:
    return load(str(family.folder), device="cpu")


@pytest.fixture
def attached(base: Base) -> Iterator[MaskManager]:
    manager = MaskManager.attach(base.model)
    yield manager
    manager.detach()


def test_its_targets(family: Family, base: Base) -> None:
    """Fused Linears are one target; routers, experts, embeddings and head are none."""
    found = {name.split(".", 3)[3] for name in find_targets(base.model)}
    assert found == TARGETS.get(family.name, ATTENTION | MLP)
    outputs = {name.split(".", 3)[3] for name in find_targets(base.model, "outputs")}
    assert all(name.endswith(("o_proj", "down_proj", "dense", "fc2", "c_proj", "output_linear")) for name in outputs)
    assert {name.split(".")[2] for name in find_targets(base.model, "outputs")} == {"0", "1"}


def test_a_mixed_batch_is_the_models_own(family: Family, base: Base, attached: MaskManager) -> None:
    """Base and two personas in one batch, in both phases, prompts beyond the window and in chunks, first computed
    and then from the prefix cache: tokens and log probabilities equal those of one request alone.
    """
    plain = AutoModelForCausalLM.from_pretrained(family.folder, attn_implementation="eager")
    worn: list[tuple[AppliedMask | None, Any]] = [(None, plain)]
    for rho, gamma in ((0.02, 0.0), (0.3, 0.5)):
        mask = world.make_mask(base, rho, seed=1)
        worn.append((AppliedMask(attached.fit(mask), gamma), world.materialise(plain, mask, gamma)))
    engine = Engine(base, EngineConfig(max_batch_tokens=48))
    for again in (False, True):
        asked = []
        for place, prompt in enumerate(PROMPTS):
            for number, (applied, model) in enumerate(worn):
                listener, sampling = Listener(), SamplingParams(temperature=0, logprobs=2)
                phase: Any = "decode" if (place + number) % 2 else "all"
                asked.append((Request(prompt, COUNT, listener, applied, phase, sampling), listener, model))
        engine.submit(*(request for request, _, _ in asked))
        finish(engine)
        assert not again or all(request.num_cached >= 16 for request, _, _ in asked)
        for request, listener, model in asked:
            check(request, listener, plain, model)
        assert len({tuple(request.ids[len(request.prompt) :]) for request, _, _ in asked}) > 3
    engine.stop()


@torch.no_grad()
def check(request: Request, listener: Listener, plain: Any, model: Any) -> None:
    """Each token is the one that the plain model prefers after those before it, and as likely."""
    tokens = [token.id for token in listener.tokens]
    cache, rest = world.begin(plain, list(request.prompt), request.phase)
    logits = model(torch.tensor([rest + tokens]), past_key_values=cache).logits[0, len(rest) - 1 :].float()
    best = logits.topk(2).values
    for token, row, (first, second) in zip(listener.tokens, logits, best.tolist(), strict=False):
        assert token.id == int(row.argmax()) or first - second < world.TIE
        assert token.logprob == pytest.approx(float(row.log_softmax(-1)[token.id]), abs=1e-4)
    assert len(tokens) == COUNT or int(logits[-1].argmax()) == 2


@pytest.mark.parametrize("score", ["contrastive-wanda", "refined"])
def test_a_mask_is_built_published_and_served(
    family: Family, base: Base, attached: MaskManager, tmp_path: Path, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = SearchSettings(rho=0.05, steps=2, judged_from=2, saved_every=2, batches_a_step=1, neutral_batches_a_step=1)
    monkeypatch.setattr(Recipe, "search_settings", few)
    monkeypatch.setattr(certificate, "read_facts", lambda _: [])  # a random model knows none, and they take long
    recipe = Recipe(score=score, rho=0.05, gamma=0.0, phase="decode", force=True, judged=2, judged_tokens=64)
    sides = [
        PersonaExamples(name, [Example(({"role": "user", "content": f"q{place}"},), words) for place in range(8)])
        for name, words in (("vowels", "aeiou"), ("consonants", "bcdfg"))
    ]
    work = Builder(base, attached, recipe, *sides, [Example((), f"neutral text {place}") for place in range(4)]).run()
    while True:
        try:
            next(work)
        except StopIteration as end:
            masks: list[Mask] = end.value.masks
            break
    registry = Registry(tmp_path)
    for mask in masks:
        registry.publish_built(mask)
    read = registry.store.open(registry.resolve("vowels").digest, base.fingerprint)
    assert read.targets.keys() == find_targets(base.model).keys()
    assert read.digest == masks[0].digest != masks[1].digest
    assert read.pruned == read.info.certificate["pruned"] > 0
    engine, applied = Engine(base, EngineConfig()), AppliedMask(attached.fit(read), 0.0)
    (tokens,) = engine.generate(
        [Request([1, 5, 9], 4, lambda _: None, applied, sampling=SamplingParams(temperature=0))]
    )
    engine.stop()
    assert world.speak(base.model, world.materialise(base.model, read, 0.0), [1, 5, 9], 4, base.ends).agrees(tokens)


def test_responses_after_stored_prompts_are_as_likely_as_in_the_whole_text(base: Base, attached: MaskManager) -> None:
    """A search computes prompts once, layer by layer, and the responses after them."""
    scratch = Scratch()
    batch = ResponseBatch(base, LayerwiseModel(base), scratch, "r", TEXTS, 48)
    for _ in batch.store_prompts():
        pass
    hidden = batch.enter()
    with torch.no_grad():
        for layer in range(2):
            hidden = batch.run(layer, hidden)
        logits = LayerwiseModel(base).predict(hidden[batch.counted])
    nats = logits.log_softmax(-1)[range(len(batch.following)), batch.following]
    found = [float(nats[batch.rows == row].mean()) for row in range(len(TEXTS))]
    assert found == pytest.approx([one.mean for one in likelihoods(base, TEXTS)], abs=1e-4)


def test_statistics_are_those_of_the_whole_model(base: Base, attached: MaskManager) -> None:
    """They are collected layer by layer, in padded batches; the oracle takes one text at a time."""
    targets = find_targets(base.model)
    texts: Any = {"own": CalibrationText(list(batches(TEXTS, base.device)), frozenset({"channels", "gradient"}))}
    collector = StatisticsCollector(base, targets, texts, Scratch())
    passes: list[dict[str, LinearStatistics]] = [{}, {}]
    for run, found in zip((collector.forward, collector.backward), passes, strict=True):

        def keep(_: int, of_layer: Mapping[str, LinearStatistics], found: Any = found) -> Iterator[int]:
            found.update(of_layer)
            yield len(of_layer)

        for _ in run(keep):
            pass
    squares, gradients = observe(base, targets)
    for name in targets:
        channels = passes[0][name].own.channels
        assert channels is not None
        torch.testing.assert_close(channels.norm, squares[name].sqrt(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(passes[1][name].own.gradient, gradients[name], rtol=1e-2, atol=1e-5)


def observe(base: Base, targets: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mean squares of inputs and gradients of the mean log-likelihood of the response tokens of `TEXTS`."""
    counted = sum(len(text.response) for text in TEXTS)
    squares = {name: torch.zeros(linear.in_features) for name, linear in targets.items()}
    weights = [base.model.get_submodule(name).weight.requires_grad_(True) for name in targets]
    total = torch.zeros(())
    for text in TEXTS:
        first, last = len(text.prompt) - 1, len(text) - 1

        def add(name: str, first: int = first, last: int = last) -> Any:
            def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
                squares[name] += args[0].detach().flatten(0, -2)[first:last].square().sum(0) / counted

            return hook

        handles = [base.model.get_submodule(name).register_forward_pre_hook(add(name)) for name in targets]
        logits = base.model(torch.tensor([text.prompt + text.response]), use_cache=False).logits[0, first:last]
        total = total + logits.log_softmax(-1)[range(len(text.response)), text.response].sum() / counted
        for handle in handles:
            handle.remove()
    return squares, dict(zip(targets, torch.autograd.grad(total, weights), strict=True))


@pytest.mark.parametrize("how", ["int8", "nf4", "fp4"])
def test_its_quantised_forms_compute_with_what_their_codes_stand_for(tmp_path: Path, family: Family, how: str) -> None:
    folder = families.make_family(tmp_path, family.name, **WIDER)
    dense, base = (load(str(folder), device="cpu", quantization=form) for form in (None, how))
    check_logits(base, dense, TOLERANCE[how])
    if how == "nf4":  # through the engine, in one batch
        check_tokens(load(str(folder), device="cpu", quantization=how), dense)


def test_every_supported_family_is_tested() -> None:
    assert {model_type for model_type, _ in families.FAMILIES.values()} == set(SUPPORTED)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_and_routers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    base = load(str(families.make_family(tmp_path, name)), device="cpu")
    manager = MaskManager.attach(base.model)
    weights = [name for name, _ in base.model.named_parameters() if "experts." in name]
    routers = [name for name, _ in base.model.named_parameters() if name.endswith((".gate.weight", "router.weight"))]
    assert weights
    assert routers
    for target, words in ((weights[0], "belongs to experts"), (routers[0].removesuffix(".weight"), "is a router")):
        mask = Mask(
            BaseRef(base.fingerprint, base.name),
            {target: encode_target(torch.eye(32, dtype=torch.bool).numpy())},
            MaskInfo(persona="p", score="random"),
        )
        with pytest.raises(MaskMismatch, match=rf"{target}.* {words}.*attention, dense MLPs and shared experts"):
            manager.fit(mask)
    manager.detach()


def test_a_build_without_any_target_in_its_scope_is_refused(tmp_path: Path) -> None:
    base = load(str(families.make_family(tmp_path, "Mixtral")), device="cpu")
    own = PersonaExamples("p", [Example((), "text")])
    with pytest.raises(BuildFailed, match=r"has no Linears in the scope 'mlp': masks apply to .* shared experts"):
        Builder(base, MaskManager(base.model), Recipe(score="wanda", scope="mlp"), own)


@pytest.mark.parametrize(
    ("name", "changes", "context"),
    [
        ("Phi-4 mini", {}, 128),  # from there on, LongRoPE's frequencies would be those of the longest request
        ("Llama 4", {"floor_scale": 100}, 99),
        ("Llama 4", {"floor_scale": 100, "attn_temperature_tuning": False}, 256),
    ],
)
def test_a_context_ends_where_requests_would_depend_on_each_other(
    tmp_path: Path, name: str, changes: dict[str, Any], context: int
) -> None:
    assert load(str(families.make_family(tmp_path, name, **changes)), device="cpu").context == context


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("kind", "text", "more"),
    [
        (Gemma3Config, "Gemma 3", {"mm_tokens_per_image": 4}),
        (Mistral3Config, "Ministral 3", {"tie_word_embeddings": False}),
        (Llama4Config, "Llama 4", {}),
    ],
    ids=["Gemma 3", "Mistral 3", "Llama 4"],
)
def test_of_a_model_that_reads_images_the_language_model_is_served(
    tmp_path: Path, kind: Any, text: str, more: dict[str, Any]
) -> None:
    vision = VISION
    if kind is Llama4Config:
        vision = VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    whole = AutoModelForImageTextToText.from_config(
        kind(text_config=families.make_config(text).to_dict(), vision_config=vision, **more)
    ).eval()
    whole.save_pretrained(tmp_path)
    world.make_tokenizer().save_pretrained(tmp_path)
    base, ids = load(str(tmp_path), device="cpu"), torch.tensor([PROMPTS[0]])
    assert base.model.config.model_type == families.FAMILIES[text][0]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "diffllama", "t5", "qwen3_next", "deepseek_v3", "klingon"])
def test_another_family_is_refused_by_name(tmp_path: Path, model_type: str) -> None:
    """Before its weights are read: DiffLlama's are those of a Llama, and its answers would be wrong."""
    families.make_family(tmp_path, "Llama 2")
    config = {} if model_type == "klingon" else AutoConfig.for_model(model_type).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(UnusableModel, match=rf"is a '{model_type}' model.*Supported families: Llama .*gpt_oss"):
        load(str(tmp_path), device="cpu")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """transformers would serve random ones."""
    families.make_family(tmp_path, "Llama 2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(UnusableModel, match=r"weights of .*model.layers.0.self_attn.k_proj.bias"):
        load(str(tmp_path), device="cpu")
