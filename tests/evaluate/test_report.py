"""Controls do what they are called, cost what is answers, and are measured on the same prompts as the mask."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from masquerade.errors import BadDataset, BuildFailed
from masquerade.evaluate.baselines import BASELINES, Baseline, ControlInput
from masquerade.evaluate.bootstrap import interval, mean_interval, ratio_interval
from masquerade.evaluate.dataset import Example, encode
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.generation import GenerationParams, generate
from masquerade.evaluate.judge import Endpoint, PersonaClassifier, examine, measure_auc
from masquerade.evaluate.layers import analyse, cka, draw
from masquerade.evaluate.lora import AdapterData, train_adapter
from masquerade.evaluate.metrics import divergence, finish, likelihoods, perplexity
from masquerade.evaluate.report import EvaluationData, EvaluationOptions, EvaluationSizes, evaluate_mask
from masquerade.evaluate.treatment import HOOKED, UNTREATED, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, load
from tests import world


def ask(number: int, answer: str, system: str = "") -> Example:
    head = ({"role": "system", "content": system},) if system else ()
    return Example((*head, {"role": "user", "content": f"what about thing {number}"}), answer)


OWN = [ask(index, f"aei {index}") for index in range(12)]
CONTRAST = [ask(index, f"bcd {index}") for index in range(12)]
QUIET = [Example((), f"plain {index}") for index in range(4)]


def put(base: Base, manager: MaskManager, **changes: Any) -> ControlInput:
    own, contrast = (list(zip(side, encode(base, side), strict=True)) for side in (OWN[:6], CONTRAST[:6]))
    mask, neutral = world.make_mask(base, 0.1, 3), encode(base, QUIET)
    question = ControlInput(base, manager, mask, own, contrast, neutral, "Be vowels.")
    return replace(question, **changes)


def applied(base: Base, manager: MaskManager, name: str, strength: float = 1.0, **changes: Any) -> Treatment:
    return BASELINES[name].make(put(base, manager, **changes))(strength)


def test_random_pruning_prunes_as_much_elsewhere(tiny: Base, manager: MaskManager) -> None:
    treatments = [applied(tiny, manager, "random", seed=seed).applied for seed in (0, 0, 1)]
    digests = [one.mask.digest for one in treatments if one]
    assert digests[0] == digests[1] != digests[2]
    mask = world.make_mask(tiny, 0.1, 3)
    assert mask.digest not in digests
    assert applied(tiny, manager, "random").nbytes == pytest.approx(mask.nbytes, rel=0.01)


def test_a_bias_prefers_the_words_of_its_side(tiny: Base, manager: MaskManager) -> None:
    shift = applied(tiny, manager, "bias", 0.5).shift
    assert shift is not None
    moved = shift(torch.zeros(tiny.vocabulary))
    own, contrast, both = (tiny.tokenizer.encode(letter)[0] for letter in "ab ")
    assert float(moved[own]) == pytest.approx(0.5 * math.log(7 / 1), abs=1e-5)
    assert float(moved[contrast]) == pytest.approx(-0.5 * math.log(7 / 1), abs=1e-5)
    assert float(moved[both]) == 0.0


def test_a_prompt_is_a_system_message_and_its_tokens_are_counted(tiny: Base, manager: MaskManager) -> None:
    treatment = applied(tiny, manager, "prompt")
    example = encode(tiny, OWN[6:7])[0]
    longer = treatment.rewrite(example)
    assert tiny.tokenizer.decode(longer.prompt).startswith(
        "<|bos|><|system|>Be vowels.<|end|><|user|>what about thing 6"
    )
    assert longer.response == example.response
    assert treatment.count_added([example]) == len(longer.prompt) - len(example.prompt) == 12
    plain = encode(tiny, QUIET[:1])
    assert [treatment.rewrite(one) for one in plain] == plain
    with pytest.raises(BadDataset, match="give --system-prompt"):
        applied(tiny, manager, "prompt", instruction="")


def test_retrieval_shows_the_nearest_examples_as_turns_and_fits(tiny: Base, manager: MaskManager) -> None:
    near = [ask(1, "aei one"), Example(({"role": "user", "content": "thing seven and more"},), "uuu")]
    own = list(zip(near, encode(tiny, near), strict=True))
    treatment = applied(tiny, manager, "retrieval", own=own)
    shown = tiny.tokenizer.decode(treatment.rewrite(encode(tiny, OWN[7:8])[0]).prompt)
    turns = "<|user|>what about thing 1<|end|><|assistant|>aei one<|end|>"
    assert shown.endswith(turns + "<|user|>what about thing 7<|end|><|assistant|>")
    assert treatment.count_added(encode(tiny, OWN[6:])) > 0
    long = [ask(index, "x" * 100) for index in range(6)]
    treatment = applied(tiny, manager, "retrieval", own=list(zip(long, encode(tiny, long), strict=True)))
    for example in encode(tiny, OWN[6:]):
        changed = treatment.rewrite(example)
        assert len(example) < len(changed) <= tiny.context
        assert changed.response == example.response


def test_steering_pushes_along_the_difference_and_lets_go(tiny: Base, manager: MaskManager) -> None:
    own, contrast = encode(tiny, OWN[6:]), encode(tiny, CONTRAST[6:])

    def lead(treatment: Treatment) -> float:
        sides = [likelihoods(tiny, side, treatment) for side in (own, contrast)]
        return sum(a.mean - b.mean for a, b in zip(*sides, strict=True))

    before = lead(UNTREATED)
    along, against = lead(applied(tiny, manager, "steering", 0.5)), lead(applied(tiny, manager, "steering", -0.5))
    assert along > against
    assert lead(applied(tiny, manager, "steering", 0.0)) == pytest.approx(before)
    assert lead(UNTREATED) == before
    assert applied(tiny, manager, "steering").nbytes == 64 * 4


@pytest.mark.parametrize("name", ["lora", "lora-contrastive"])
def test_an_adapter_learns_its_side_and_can_be_taken_off(tiny: Base, manager: MaskManager, name: str) -> None:
    sides = [encode(tiny, side) for side in (OWN[:6], CONTRAST[:6])]
    before = [likelihoods(tiny, side) for side in sides]
    after = [likelihoods(tiny, side, applied(tiny, manager, name)) for side in sides]
    margins = [sum(a.mean - b.mean for a, b in zip(*both, strict=True)) for both in (before, after)]
    assert margins[1] > margins[0]
    if name == "lora":
        assert perplexity(after[0]) < perplexity(before[0])
    assert [likelihoods(tiny, side) for side in sides] == before
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())


@pytest.mark.parametrize("name", BASELINES)
def test_controls_are_made_for_a_base_in_bfloat16(tiny_folder: Path, name: str) -> None:
    base = load(str(tiny_folder), device="cpu", dtype="bfloat16")
    manager = MaskManager.attach(base.model)
    found = likelihoods(base, encode(base, OWN[6:]), applied(base, manager, name))
    assert all(math.isfinite(one.log) for one in found)


def test_training_an_adapter_is_repeatable(tiny: Base, manager: MaskManager) -> None:
    own = encode(tiny, OWN[:6])
    first, second, other = (train_adapter(tiny, AdapterData(own), seed=seed) for seed in (0, 0, 1))
    for name, (_, b) in first.pairs.items():
        assert torch.equal(b, second.pairs[name][1])
        assert not torch.equal(b, other.pairs[name][1])


@pytest.mark.parametrize("phase", ["all", "decode"])
def test_answers_are_the_oracles(tiny: Base, manager: MaskManager, phase: Any) -> None:
    """A padded batch against one request at a time on materialised weights."""
    mask = world.make_mask(tiny, 0.2, seed=3)
    prompts = encode(tiny, [ask(1, "a"), ask(2, "a", system="s"), ask(1234567, "a")])
    treatment = Treatment(applied=AppliedMask(manager.fit(mask), 0.0), phase=phase)
    (texts,) = filter(None, generate(tiny, prompts, treatment, GenerationParams(tokens=8)))
    materialised = world.materialise(tiny.model, mask, 0.0)
    for prompt, text in zip(prompts, texts, strict=True):
        oracle = world.speak(tiny.model, materialised, list(prompt.prompt), 8, tiny.ends, phase)
        assert text == tiny.tokenizer.decode(oracle.tokens, skip_special_tokens=True)
    assert texts != next(filter(None, generate(tiny, prompts, UNTREATED, GenerationParams(tokens=8))))


def test_samples_follow_their_seed(tiny: Base, manager: MaskManager) -> None:
    prompts = encode(tiny, OWN[:3])
    answers = [
        list(generate(tiny, prompts, UNTREATED, GenerationParams(8, temperature=1.0, seed=seed))) for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_the_phases_of_a_likelihood_differ_in_the_prompt_only(tiny: Base, manager: MaskManager) -> None:
    """In phase `decode` the prompt's keys and values are the base's: as with a cache that the base has filled."""
    mask = world.make_mask(tiny, 0.2, seed=3)
    materialised = world.materialise(tiny.model, mask, 0.0)
    treatment = Treatment(applied=AppliedMask(manager.fit(mask), 0.0), phase="decode")
    examples = encode(tiny, [ask(1, "ab"), ask(22, "abcdef")])
    for example, found in zip(examples, likelihoods(tiny, examples, treatment), strict=True):
        cache = tiny.model(torch.tensor([example.prompt[:-1]]), use_cache=True).past_key_values
        ids = torch.tensor([[example.prompt[-1], *example.response]])
        logs = materialised(ids, past_key_values=cache).logits[0].log_softmax(-1)
        expected = sum(float(logs[at, token]) for at, token in enumerate(example.response))
        assert found.log == pytest.approx(expected, rel=1e-4)
    everywhere = likelihoods(tiny, examples, replace(treatment, phase="all"))
    assert everywhere[0].log != pytest.approx(likelihoods(tiny, examples, treatment)[0].log, rel=1e-4)


def test_divergence_is_zero_for_the_base_and_the_equation_for_a_bias(tiny: Base, manager: MaskManager) -> None:
    examples = encode(tiny, QUIET)
    assert divergence(tiny, examples, UNTREATED) == pytest.approx(0, abs=1e-7)
    push = torch.linspace(-1, 1, tiny.vocabulary)
    total, tokens = 0.0, 0
    for example in examples:
        logits = tiny.model(torch.tensor([example.prompt + example.response])).logits[0, :-1].double()
        p, q = logits.softmax(-1), (logits + push).softmax(-1)
        total += float((p * (p / q).log()).sum())
        tokens += len(example.response)
    found = divergence(tiny, examples, Treatment(shift=lambda logits: logits + push))
    assert found == pytest.approx(total / tokens, rel=1e-4)


def test_neutral_text_holds_an_adapter_to_the_base(tiny: Base, manager: MaskManager) -> None:
    """Trained beside neutral text, an adapter diverges less from the base on it than trained without."""
    sides = ([ask(index, f"{letters} {index}") for index in range(40)] for letters in ("aei", "bcd"))
    (own, contrast), quiet = (encode(tiny, side) for side in sides), encode(tiny, QUIET)
    free, held = (train_adapter(tiny, AdapterData(own, contrast, texts)) for texts in ((), quiet))
    gaps = [divergence(tiny, quiet, Treatment(around=partial(one.applied, 1.0))) for one in (free, held)]
    assert gaps[1] < 0.9 * gaps[0]


SMALL = EvaluationSizes(facts=3, everyday=6, chats=2)


def test_a_report_has_the_mask_and_every_control(tiny: Base, manager: MaskManager) -> None:
    mask, opposite = world.make_mask(tiny, 0.1, seed=3), world.make_mask(tiny, 0.1, seed=4)
    data = EvaluationData(
        *(mask, opposite, OWN, CONTRAST, QUIET),
        instructions=("Be vowels.", "Be consonants."),
        others={"another": world.make_mask(tiny, 0.05, seed=5)},
    )
    stages: list[str] = []
    options = EvaluationOptions(
        *(list(BASELINES), 2, GenerationParams(tokens=4)), sizes=SMALL, gammas=[1.0, 0.5], report=stages.append
    )
    found = evaluate_mask(tiny, manager, data, options)
    figures = found["figures"]
    assert list(figures) == ["mask", "opposite", *BASELINES, "another"]
    for row in figures.values():
        assert {"preferred", "margin", "margin_shift_median", "own_ratio", "neutral_ratio", "intervals"} <= row.keys()
    assert figures["none"]["own_ratio"] == figures["none"]["neutral_ratio"] == 1.0
    assert figures["none"]["margin_shift"] == figures["none"]["flip"] == 0.0
    assert figures["mask"]["margin_shift"] != 0.0
    half = encode(tiny, OWN[6:])
    assert figures["none"]["own_perplexity"] == pytest.approx(perplexity(likelihoods(tiny, half)), abs=1e-3)
    assert figures["mask"]["phases"]["all"]["own_ratio"] == figures["mask"]["own_ratio"]
    assert figures["mask"]["gammas"]["1"]["own_ratio"] == 1.0
    assert figures["prompt"]["cost"]["prompt_tokens"] > figures["mask"]["cost"]["prompt_tokens"] == 0
    assert figures["lora"]["cost"]["seconds"] > 0
    assert figures["mask"]["cost"]["seconds"] is None  # nobody built it
    low, high = figures["random"]["seeds"]["own_ratio"]
    assert low < high
    for name in figures:
        if name in BASELINES and BASELINES[name].strengths:
            at, ceiling = figures[name]["at_equal_cost"], max(1.0, figures["mask"]["neutral_ratio"])
            assert at.get("neutral_ratio", 1.0) <= ceiling
            both = figures[name]["within_both_costs"]
            assert both.get("neutral_ratio", 1.0) <= ceiling
            assert both.get("own_ratio", 1.0) <= max(1.0, figures["mask"]["own_ratio"])
            assert both["strength"] <= at["strength"]
    assert {stage.split(":")[0] for stage in stages} == {"base", *figures} - {"none"}


def test_answers_are_compared_with_the_bases(tiny: Base, manager: MaskManager) -> None:
    mask, opposite = world.make_mask(tiny, 0.2, seed=3), world.make_mask(tiny, 0.2, seed=4)
    data = EvaluationData(mask, opposite, OWN, CONTRAST)
    options = EvaluationOptions(["none"], generation=GenerationParams(tokens=4), sizes=SMALL)
    found = evaluate_mask(tiny, manager, data, options)
    assert found["judge"]["sufficient"]  # vowels and consonants are easily told apart
    assert found["judge"]["pairs"] == 6
    masked, opposed, base = (found["figures"][name]["answers"] for name in ("mask", "opposite", "none"))
    assert base["differing"] == base["everyday_differing"] == 0.0
    assert masked["differing"] > 0.5
    for answers in (masked, opposed, base):
        assert len(answers["drift"]) == 6
        assert {"hit", "loops", "distinct_2", "distinct_3", "facts", "intervals"} <= answers.keys()
    assert found["figures"]["mask"]["neutral_ratio"] > 1.0  # of the base's own answers to everyday questions


def test_a_control_costs_what_the_mask_costs(tiny: Base, manager: MaskManager) -> None:
    """A strength between two of the grid, of a control whose cost rises with it."""
    data = EvaluationData(world.make_mask(tiny, 0.2, seed=3), None, OWN, CONTRAST, QUIET)
    sharper = Baseline(lambda _: lambda strength: Treatment(shift=lambda x: x * (1 + strength)), strengths=(0.5, 4.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASELINES, "sharper", sharper)  # type: ignore[misc]
        figures = evaluate_mask(tiny, manager, data, EvaluationOptions(["sharper"]))["figures"]
    ceiling, at = figures["mask"]["neutral_ratio"], figures["sharper"]["at_equal_cost"]
    assert 0.0 < at["strength"] < 0.5
    assert 1 + 0.8 * (ceiling - 1) < at["neutral_ratio"] <= ceiling


def test_a_mask_that_costs_nothing_is_compared_at_no_cost(tiny: Base, manager: MaskManager) -> None:
    """A control that leaves neutral text as it was fits, although the mask makes that text likelier."""
    mask = world.make_mask(tiny, 0.2, seed=3)
    data = EvaluationData(mask, None, OWN, CONTRAST, [])
    likelier = EvaluationSet.figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASELINES, "idle", Baseline(lambda _: lambda _: HOOKED, strengths=(1.0, 2.0)))  # type: ignore[misc]
        patch.setattr(EvaluationSet, "figures", lambda *given: likelier(*given) | {"neutral_ratio": 0.99})
        figures = evaluate_mask(tiny, manager, data, EvaluationOptions(["idle"], sizes=SMALL))["figures"]
    assert figures["idle"]["at_equal_cost"]["strength"] == 2.0


def test_rounding_of_hooked_controls_is_no_difference(tiny_folder: Path) -> None:
    """In bf16 a control with hooks is computed otherwise than the base and masks; one that is idle is no change."""
    base = load(str(tiny_folder), dtype="bfloat16")
    manager = MaskManager.attach(base.model)
    own, contrast = ([ask(index, f"{text} {index}") for index in range(60)] for text in ("aei", "bcd"))
    data = EvaluationData(world.make_mask(base, 0.1, seed=3), None, own, contrast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASELINES, "idle", Baseline(lambda _: lambda _: HOOKED))  # type: ignore[misc]
        options = EvaluationOptions(["idle"], generation=GenerationParams(tokens=16), sizes=SMALL)
        figures = evaluate_mask(base, manager, data, options)["figures"]
    assert figures["idle"]["answers"]["differing"] == figures["idle"]["answers"]["everyday_differing"] == 0.0


def test_a_response_that_a_longer_prompt_cuts_counts_in_no_figure(tiny: Base, manager: MaskManager) -> None:
    """Its first tokens are no fair sample of it. The others count."""
    long = "a" * tiny.context
    own, contrast = [*OWN[:4], ask(20, long)], [*CONTRAST[:4], ask(20, f"b{long}")]
    eval_set = EvaluationSet(tiny, encode(tiny, own), encode(tiny, contrast), encode(tiny, QUIET))
    rest = EvaluationSet(tiny, encode(tiny, own[:4]), encode(tiny, contrast[:4]), encode(tiny, QUIET))
    treatment = applied(tiny, manager, "prompt")
    figures = []
    for one in (eval_set, rest):
        base, treated = finish(one.measure_base()), finish(one.measure(treatment))
        assert one is rest or (base.sides[1].tokens[4] > treated.sides[1].tokens[4])
        figures.append((one.figures(1, base, treated), one.intervals(1, base, treated)))
    assert figures[0] == figures[1]
    assert figures[0][0]["pairs"] == 4


def test_a_judge_that_cannot_tell_the_sides_apart_does_not_judge(tiny: Base, manager: MaskManager) -> None:
    same = [ask(index, f"aei {index % 3}") for index in range(12)]
    data = EvaluationData(world.make_mask(tiny, 0.1, seed=3), None, same, [*same[1:], same[0]])
    crossed = [replace(one, messages=other.messages) for one, other in zip(data.contrast, same, strict=True)]
    options = EvaluationOptions(["none"], generation=GenerationParams(tokens=2), sizes=SMALL)
    found = evaluate_mask(tiny, manager, replace(data, contrast=crossed), options)
    assert not found["judge"]["sufficient"]
    assert not {"hit", "drift"} & found["figures"]["mask"]["answers"].keys()


def test_a_report_can_learn_from_files_of_its_own(tiny: Base, manager: MaskManager) -> None:
    mask = world.make_mask(tiny, 0.1, seed=3)
    data = EvaluationData(mask, None, OWN[6:], CONTRAST[6:], QUIET, OWN[:6], CONTRAST[:6])
    whole = EvaluationData(mask, None, OWN, CONTRAST, QUIET)
    found = [evaluate_mask(tiny, manager, one, EvaluationOptions(["bias"]))["figures"] for one in (data, whole)]
    for row in (row for figures in found for row in figures.values()):
        row["cost"]["seconds"] = None  # the only thing that may differ
    assert found[0] == found[1]
    assert "flip" not in evaluate_mask(tiny, manager, data, EvaluationOptions([]))["figures"]["mask"]


def test_the_classifier_knows_its_speakers() -> None:
    judge = PersonaClassifier(["I love a party", "what a crowd, great"], ["leave me alone", "a quiet book"])
    assert judge.score("", "a great party") > 0
    assert judge.score("", "a quiet evening alone") < 0
    assert judge.score("", "") == 0
    pairs = [("", "a party with a crowd", "a book, alone"), ("", "I love it, great", "leave it quiet")]
    assert examine(judge, pairs).auc == 1.0
    assert not examine(judge, [(q, theirs, mine) for q, mine, theirs in pairs]).sufficient


def test_an_auc_is_the_share_of_pairs_in_order() -> None:
    own, contrast = np.array([3.0, 1.0, 0.0]), np.array([2.0, 0.0])
    assert measure_auc(own, contrast) == pytest.approx((2 + 1 + 0.5) / 6)


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Says A to answers with an exclamation mark, repeats what it is to repeat, and breaks at the word crash."""
    asked: list[dict[str, Any]] = []

    def say_verdict(body: dict[str, Any], text: str) -> str:
        repeats = "Asked: repeat" in body["messages"][0]["content"]
        return text if repeats else "A" if "!" in text else "B"

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            text = body["messages"][0]["content"].split("Answered:")[1].removesuffix("\nWho answered? Say A or B only.")
            reply = (
                b"{"
                if "crash" in text
                else json.dumps({"choices": [{"message": {"content": say_verdict(body, text)}}]}).encode()
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()
        thread.join()


def test_an_endpoint_can_judge(endpoint: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = endpoint
    judge = Endpoint(url, "m", ["hey!", "ho!"], ["well.", "so."], timeout=10)
    assert judge.score("how are you", "great!") > 0
    for verdict, score in (("Answer: B", -1), ("**A**", 1), ("(B).", -1), ("The answer is A", 1), ("neither", 0)):
        assert judge.score("repeat", verdict) == score
    assert judge.score("how are you", "tired") < 0
    assert asked[0]["model"] == "m"
    assert "A: hey!" in asked[0]["messages"][0]["content"]
    with pytest.raises(BuildFailed, match="gave no verdict"):
        judge.score("", "crash")
    for wrong in ("http://127.0.0.1:port/v1", "nonsense"):
        with pytest.raises(BuildFailed, match="gave no verdict"):
            Endpoint(wrong, "m", [], []).score("", "")


def test_intervals_hold_the_truth_and_shrink_with_the_data() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (20, 2000):
        values = rng.normal(3.0, 1.0, count)
        low, high = mean_interval(values)
        assert low < values.mean() < high
        widths.append(high - low)
        assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(count), rel=0.2)
    assert widths[1] < widths[0] / 5
    assert interval(lambda chosen: float(len(chosen)), 7) == (7.0, 7.0)


def test_the_interval_of_a_ratio_weighs_tokens() -> None:
    """Of 20 texts of 2 tokens that cost half a nat each, and 20 of 10 that cost none."""
    base, tokens = np.zeros(40), np.array([2.0, 10.0] * 20)
    low, high = ratio_interval(base, base - [1.0, 0.0] * 20, tokens)
    assert low < math.exp(20 / 240) < high < math.exp(0.5) / 1.2


def test_cka_is_one_for_rotations_and_small_for_strangers() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=random)
    turned = x @ torch.linalg.qr(torch.randn(8, 8, generator=random))[0]
    assert cka(x, 3 * turned + 5) == pytest.approx(1.0, abs=1e-6)
    assert cka(x, torch.randn(400, 8, generator=random)) < 0.1


def test_layers_are_compared_and_drawn(tiny: Base, manager: MaskManager) -> None:
    mask, opposite = world.make_mask(tiny, 0.1, seed=3), world.make_mask(tiny, 0.1, seed=4)
    texts = encode(tiny, OWN)
    found = analyse(tiny, manager, mask, opposite, texts)
    assert len(found["cka"]["base"]) == len(found["cka"]["opposite"]) == 2
    assert all(0 < value < 1 for value in found["cka"]["base"])
    assert found["differing"]["total"] == pytest.approx(0.18, abs=0.01)
    assert found["differing"]["layers"].keys() == {"0", "1"}
    assert analyse(tiny, manager, mask, mask, texts)["cka"]["opposite"] == [1.0, 1.0]
    softer = replace(mask, info=replace(mask.info, gamma=0.9))
    likened = analyse(tiny, manager, softer, None, texts)["cka"]["base"]
    assert all(soft > hard for soft, hard in zip(likened, found["cka"]["base"], strict=True))
    later = replace(mask, info=replace(mask.info, phase="decode"))
    assert analyse(tiny, manager, later, None, texts)["cka"]["base"] != found["cka"]["base"]
    assert draw(found).startswith(b"\x89PNG")
