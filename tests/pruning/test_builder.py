"""A built mask does what it was built for, is the same when built again, and says what was done."""

from __future__ import annotations

import random
import re
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskstore import InvalidName, Mask
from masquerade.errors import BadDataset, BuildFailed, InvalidValue
from masquerade.evaluate.dataset import Example
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.facts import read_facts, write_neutral_text
from masquerade.evaluate.metrics import likelihoods, perplexity
from masquerade.model import Base, MaskManager
from masquerade.pruning import SCORES, Builder, PersonaExamples, Progress, Recipe, Scratch, certificate, neutral
from masquerade.pruning.tuning import Budgets

QUIET = [Example((), f"neutral text {index}") for index in range(6)]
SHORT = pytest.mark.usefixtures("short_builds")
FREE = Recipe(score="attribution", rho=0.01, force=True)  # the tiny model is random: no mask would pass


def make_examples(words: str, count: int = 40, seed: int = 0) -> list[Example]:
    """Somebody who answers any question with words of their own."""
    rng = random.Random(seed)
    return [
        Example(({"role": "user", "content": f"q{index % 8}"},), "".join(rng.choices(words, k=6)))
        for index in range(count)
    ]


def run(builder: Builder) -> tuple[list[Progress], list[Mask]]:
    """The steps and the masks of a build that refuses none."""
    steps = []
    work = builder.run()
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            result = end.value
            break
    assert not result.refused
    return steps, result.masks


def finish(work: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def make(base: Base, manager: MaskManager, recipe: Recipe, contrast_name: str = "consonants", **more: Any) -> Builder:
    own, contrast = (
        PersonaExamples("vowels", make_examples("aeiou")),
        PersonaExamples(contrast_name, make_examples("bcdfg", seed=1)),
    )
    return Builder(base, manager, recipe, own, contrast, QUIET, **more)


@SHORT
@pytest.mark.parametrize("score", list(SCORES))
def test_opposites_are_built_in_one_run(tiny: Base, manager: MaskManager, score: str) -> None:
    steps, masks = run(make(tiny, manager, replace(FREE, score=score, rho=0.1)))
    assert [mask.info.persona for mask in masks] == ["vowels", "consonants"]
    assert [mask.info.opposite for mask in masks] == ["consonants", "vowels"]
    assert (masks[0].digest == masks[1].digest) == (score == "magnitude")  # which reads no text
    assert {step.stage for step in steps} >= {"check", "encode", "forward", "certify"}
    for stage in {step.stage for step in steps}:
        done = [step for step in steps if step.stage == stage]
        counts = [step.done for step in done]
        assert counts == sorted(counts)  # an item may be less than a part of the stage
        assert counts[-1] == done[-1].total
        assert all(step.total is None or step.done <= step.total > 0 for step in done)
    for mask in masks:
        assert mask.base.fingerprint == tiny.fingerprint
        assert mask.info.certificate["pruned"] == mask.pruned > 0
        assert mask.info.parameters["score"] == score


@SHORT
def test_attribution_shifts_the_margin_to_its_side(tiny: Base, manager: MaskManager) -> None:
    _, masks = run(make(tiny, manager, FREE))
    for mask in masks:
        assert mask.info.certificate["margin_shift"] > 0


@SHORT
@pytest.mark.parametrize("score", ["attribution-fisher", "sparsegpt"])
def test_the_same_build_gives_the_same_digest(tiny: Base, manager: MaskManager, score: str) -> None:
    first, second = (run(make(tiny, manager, replace(FREE, score=score, rho=0.1)))[1] for _ in range(2))
    assert [mask.digest for mask in first] == [mask.digest for mask in second]


@SHORT
@pytest.mark.parametrize("score", ["attribution-fisher", "wanda"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_build_goes_on_where_it_was(
    tiny: Base, manager: MaskManager, tmp_path: Path, score: str, share: float
) -> None:
    recipe = replace(FREE, score=score, rho=0.1)
    whole, masks = run(make(tiny, manager, recipe, batch_tokens=64))
    work = make(tiny, manager, recipe, batch_tokens=64, scratch=Scratch(tmp_path / "s")).run()
    for _ in range(int(share * len(whole))):
        next(work)
    del work  # killed
    scratch = Scratch(tmp_path / "s")
    rest, found = run(make(tiny, manager, recipe, batch_tokens=64, scratch=scratch))
    assert [mask.digest for mask in found] == [mask.digest for mask in masks]
    assert len(rest) < len(whole) or share < 0.9
    scratch.close()  # the masks are safe
    assert not (tmp_path / "s").exists()


@SHORT
def test_rho_is_the_share_pruned_of_each_linear(tiny: Base, manager: MaskManager) -> None:
    _, masks = run(make(tiny, manager, replace(FREE, score="wanda", rho=0.25, group="row", scope="outputs")))
    assert {name.rpartition(".")[2] for name in masks[0].targets} == {"o_proj", "down_proj"}
    for target in masks[0].targets.values():
        assert (~target.to_keep()).sum(1).tolist() == [round(0.25 * target.shape[1])] * target.shape[0]


@SHORT
@pytest.mark.parametrize("score", [name for name, score in SCORES.items() if not score.searched])
def test_channels_are_pruned_whole_and_rho_is_their_share(tiny: Base, manager: MaskManager, score: str) -> None:
    _, masks = run(make(tiny, manager, replace(FREE, score=score, structure="channels", rho=0.1)))
    for mask in masks:
        for target in mask.targets.values():
            pruned = ~target.to_keep()
            assert (pruned == pruned[0]).all()
            assert pruned[0].sum() == round(0.1 * target.shape[1])
        assert mask.info.parameters["structure"] == "channels"
        assert mask.info.parameters["group"] == "layer"
        assert mask.info.certificate["curve"]
    if SCORES[score].allocates:
        own, contrast = masks
        assert not (own & contrast).pruned


@SHORT
def test_the_score_of_a_channel_is_the_sum_of_its_weights(tiny: Base, manager: MaskManager) -> None:
    _, masks = run(make(tiny, manager, replace(FREE, score="magnitude", structure="channels", rho=0.1)))
    for name, target in masks[0].targets.items():
        sums = tiny.model.get_submodule(name).weight.abs().sum(0)
        count = round(0.1 * len(sums))
        assert set((~target.to_keep()[0]).nonzero()[0]) == set(sums.argsort()[:count].tolist())


def test_auto_takes_a_score_that_ranks_channels(tiny: Base, manager: MaskManager) -> None:
    assert Recipe(structure="channels").plan(contrast=True).score == "attribution-fisher"
    assert Recipe(structure="channels").plan(contrast=False).score == "wanda"
    with pytest.raises(InvalidValue, match="structure 'channels' has no meaning for the score 'refined'"):
        make(tiny, manager, Recipe(score="refined", structure="channels"))
    with pytest.raises(InvalidValue, match="group 'row' has no meaning for the structure 'channels'"):
        make(tiny, manager, Recipe(score="wanda", group="row", structure="channels"))


@SHORT
def test_counting_all_tokens_or_another_phi_is_another_mask(tiny: Base, manager: MaskManager) -> None:
    changes: list[dict[str, Any]] = [{}, {"tokens": "all"}, {"phi": "softplus"}]
    recipe = replace(FREE, score="contrastive-wanda", rho=0.1)
    digests = {run(make(tiny, manager, replace(recipe, **change)))[1][0].digest for change in changes}
    assert len(digests) == 3


@SHORT
def test_wanda_needs_no_opposite_and_is_what_auto_takes_without_one(tiny: Base, manager: MaskManager) -> None:
    for score in ("wanda", "auto"):
        recipe = Recipe(score=score, rho=0.1, force=True)
        _, masks = run(Builder(tiny, manager, recipe, PersonaExamples("vowels", make_examples("aeiou")), None, QUIET))
        assert [(mask.info.persona, mask.info.score) for mask in masks] == [("vowels", "wanda")]
        assert "margin_shift" not in masks[0].info.certificate


def test_a_contrast_without_a_name_gets_no_mask_but_flips_are_counted(tiny: Base, manager: MaskManager) -> None:
    _, masks = run(make(tiny, manager, FREE, contrast_name=""))
    assert [mask.info.persona for mask in masks] == ["vowels"]
    assert masks[0].info.opposite is None
    assert 0 <= masks[0].info.certificate["flip"] <= 1


def test_without_neutral_text_the_base_answers_questions(tiny: Base, manager: MaskManager) -> None:
    builder = Builder(tiny, manager, replace(FREE, score="wanda"), PersonaExamples("vowels", make_examples("aeiou")))
    steps, masks = run(builder)
    assert "neutral" in {step.stage for step in steps}
    assert masks[0].info.certificate["splits"]["neutral"] == neutral.FEWEST  # the tiny model is sure of nothing


def test_neutral_answers_are_those_that_the_base_is_surest_of(tiny: Base, manager: MaskManager) -> None:
    """A base that knows no facts, as the tiny one."""
    kept = finish(neutral.generate_neutral_text(tiny, "report"))
    texts = finish(write_neutral_text(tiny, [fact.question for fact in read_facts("report")]))
    doubts = {one: perplexity(likelihoods(tiny, [one])) for one in texts}
    assert set(kept) == set(sorted(doubts, key=lambda one: doubts[one])[: neutral.FEWEST])


def test_the_certificate_says_everything(tiny: Base, manager: MaskManager) -> None:
    _, masks = run(make(tiny, manager, replace(FREE, score="auto", rho="auto", own_budget=50, neutral_budget=50)))
    found = masks[0].info.certificate
    figures = {"flip", "own_ratio", "neutral_ratio", "margin_shift", "preferred", "kl", "pruned", "pruned_share"}
    assert found.keys() >= figures | {
        "intervals",
        "phases",
        "overlap",
        "splits",
        "seed",
        "seconds",
        "versions",
        "passed",
        "reasons",
    }
    assert found["phases"].keys() == {"all", "decode"}
    assert [point["gamma"] for point in found["curve"]] == list(certificate.CURVE)
    assert all(point.keys() >= {"own_ratio", "neutral_ratio", "margin_shift_median"} for point in found["curve"])
    assert found["facts"] == {"of": 100, "known": 0, "kept": None}  # the tiny model is random
    assert found["loops"].keys() == {"masked", "base", "of"}
    assert found["phases"][masks[0].info.phase]["flip"] == found["flip"]
    assert found["phases"]["all"] != found["phases"]["decode"]
    assert {trial["score"] for trial in found["choice"]["tried"]} == {"refined"}
    assert masks[0].info.parameters["group"] == "model"
    for name, (low, high) in found["intervals"].items():
        value = found["preferred"]["masked"] if name == "preferred" else found[name]
        assert low - 1e-3 <= value <= high + 1e-3, name


class Bench:
    """An evaluation set on which a mask's cost and effect are proportional to how much it prunes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float, flip: float, shift: float = 1.0) -> None:
        def figures(_: EvaluationSet, __: int, ___: Any, masked: Any, ____: Any = None) -> dict[str, Any]:
            rho = masked
            kept = {"margin_shift_median": shift * rho, "flip": min(1.0, flip * rho)}
            return {"own_ratio": 1.0, "neutral_ratio": 1 + cost * rho, "pairs": 9} | kept

        def read(_: EvaluationSet, treatment: Any) -> Generator[None, None, Any]:
            yield
            if treatment.applied is None:
                return None
            sizes = [c.shape[0] * c.shape[1] for c in treatment.applied.mask.corrections.values()]
            share = sum(c.pruned for c in treatment.applied.mask.corrections.values()) / sum(sizes)
            return share * (1 - treatment.applied.gamma)

        monkeypatch.setattr(EvaluationSet, "figures", figures)
        monkeypatch.setattr(EvaluationSet, "measure", read)
        monkeypatch.setattr("masquerade.pruning.certificate.measure_figures", self._judge)

    def _judge(self, *_: Any) -> Generator[None, None, dict[int, dict[str, Any]]]:
        yield
        found = {"own_ratio": 1.0, "intervals": {"own_ratio": [1.0, 1.0]}, "phases": {}}
        return {1: found, -1: found}


@pytest.mark.parametrize(
    ("cost", "flip", "rho"),
    [
        (1.9, 1.0, 0.01),  # the largest whose cost stays within 1.02
        (0.1, 1.0, 0.03),  # the largest there is
        (0.1, 198.0, 0.005),  # enough effect stops the search
        (1.9, 20.0, 0.01),  # more effect would cost too much
    ],
)
def test_auto_takes_the_largest_rho_within_the_budgets(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch, cost: float, flip: float, rho: float
) -> None:
    Bench(monkeypatch, cost, flip)
    _, masks = run(make(tiny, manager, Recipe(score="attribution", phase="all", strength="gentle")))
    assert [mask.info.parameters["rho"] for mask in masks] == [rho, rho]


def test_auto_gives_up_rather_than_ruin_the_model(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bench(monkeypatch, cost=10000, flip=1)
    result = finish(make(tiny, manager, Recipe(score="attribution", phase="all", strength="gentle")).run())
    assert (result.masks, [one.persona for one in result.refused]) == ([], ["vowels", "consonants"])
    for one in result.refused:
        assert re.search(r"no rho .* attribution 0\.0001 \(own x1\.000, neutral x1\.\d+, shift 0\.\d+\)", one.reason)
    _, masks = run(make(tiny, manager, Recipe(score="attribution", phase="all", strength="gentle", force=True)))
    assert masks[0].info.parameters["rho"] == 0.0001


def test_auto_weakens_the_smallest_mask_that_costs_too_much(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bench(monkeypatch, cost=300, flip=1)
    recipe = Recipe(score="attribution", phase="all", strength="gentle")
    _, masks = run(make(tiny, manager, recipe))
    assert [(mask.info.parameters["rho"], mask.info.gamma) for mask in masks] == [(0.0001, 0.4)] * 2
    tried = masks[0].info.certificate["choice"]["tried"]  # type: ignore[index]
    assert {trial["gamma"] for trial in tried} == {0.0, 0.5, 0.4, 0.3}
    result = finish(make(tiny, manager, replace(recipe, gamma=0.0)).run())
    assert len(result.refused) == 2


def test_auto_goes_below_the_usual_rhos_where_they_cost_too_much(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bench(monkeypatch, cost=40, flip=1)
    _, masks = run(make(tiny, manager, Recipe(score="attribution", phase="all", strength="gentle")))
    assert masks[0].info.parameters["rho"] == 0.0003


def test_auto_leaves_what_shifts_less_for_more_weights(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bench(monkeypatch, cost=0.1, flip=1)
    figures = EvaluationSet.figures
    monkeypatch.setattr(
        EvaluationSet, "figures", lambda *args: figures(*args) | {"margin_shift_median": 0.02 - abs(args[3] - 0.005)}
    )
    _, masks = run(make(tiny, manager, Recipe(score="attribution", phase="all", strength="gentle")))
    assert masks[0].info.parameters["rho"] == 0.005


@SHORT
def test_a_mask_that_does_nothing_or_too_much_is_refused(tiny: Base, manager: MaskManager, tmp_path: Path) -> None:
    """Random halves of one persona's answers do not differ; half of all weights are too many to prune."""
    words = make_examples("aeiou", count=160)
    own, same = (
        PersonaExamples("vowels", words[:80]),
        PersonaExamples("again", make_examples("aeiou", count=80, seed=9)),
    )
    harmless = Recipe(score="signed", rho=0.001, own_budget=9, neutral_budget=9)
    vowels = finish(Builder(tiny, manager, harmless, own, same, QUIET).run()).refused[0]
    assert vowels.persona == "vowels"
    assert "'vowels' (signed, rho 0.001) is refused: no effect: it shifts margins by" in str(vowels)
    scratch = Scratch(tmp_path / "s")
    refused = finish(make(tiny, manager, Recipe(score="wanda", rho=0.9), scratch=scratch).run()).refused
    assert re.search(r"too costly: own perplexity x\d+.*, budget x1.05", refused[0].reason)
    kept = [file for file in (tmp_path / "s").rglob("*") if file.is_file()]
    assert kept
    forced = Recipe(score="wanda", rho=0.9, force=True)
    _, masks = run(make(tiny, manager, forced, scratch=scratch))
    assert masks[0].info.certificate is not None
    assert masks[0].info.certificate["forced"]
    scratch.close()
    assert not (tmp_path / "s").exists()


@SHORT
def test_the_refusal_of_one_side_leaves_the_other_its_mask(tiny: Base, manager: MaskManager, tmp_path: Path) -> None:
    """With force, the refused one comes too, and the other is the same again."""
    recipe = Recipe(score="attribution", rho=0.01)
    found = finish(make(tiny, manager, recipe, scratch=Scratch(tmp_path / "s")).run())
    assert [mask.info.persona for mask in found.masks] == ["vowels"]
    assert [one.persona for one in found.refused] == ["consonants"]
    assert found.refused[0].reason.startswith("too costly: neutral perplexity x")
    assert re.search(
        r"'consonants' \(attribution, rho 0.01\) is refused: .*; 'vowels' is published; check ", found.explain()
    )
    scratch = Scratch(tmp_path / "s")
    steps, masks = run(make(tiny, manager, replace(recipe, force=True), scratch=scratch))
    assert [mask.info.certificate["forced"] for mask in masks] == [False, True]
    same = found.masks[0], masks[0]
    assert same[0].digest == same[1].digest
    assert _without_time(same[0]) == _without_time(same[1])
    whole, _ = run(make(tiny, manager, replace(recipe, force=True)))
    assert len(steps) < len(whole)
    scratch.close()
    assert not (tmp_path / "s").exists()


def _without_time(mask: Mask) -> dict[str, Any]:
    return {name: figure for name, figure in mask.info.certificate.items() if name != "seconds"}


def test_a_side_without_a_gamma_within_the_budgets_is_refused_alone(
    tiny: Base, manager: MaskManager, tmp_path: Path
) -> None:
    """Neutral text is vowels: the mask of consonants makes it unlikelier, and the other one likelier."""
    recipe = Recipe(score="refined", rho=0.01, neutral_budget=1.001)
    quiet = [Example((), "".join(random.Random(number).choices("aeiou", k=12))) for number in range(9)]
    sides = PersonaExamples("vowels", make_examples("aeiou")), PersonaExamples("c", make_examples("bcdfg", seed=1))
    found = finish(Builder(tiny, manager, recipe, *sides, quiet, Scratch(tmp_path / "s")).run())
    assert [mask.info.persona for mask in found.masks] == ["vowels"]
    assert [one.persona for one in found.refused] == ["c"]
    assert "no gamma keeps perplexity within 1.05 (own) and 1.001 (neutral): refined " in found.refused[0].reason
    kept = [file for file in (tmp_path / "s").rglob("*") if file.is_file()]
    assert {file.name for file in kept} == {"lock", "found.safetensors"}  # and none of the search
    forced = replace(recipe, force=True)
    steps, masks = run(Builder(tiny, manager, forced, *sides, quiet, Scratch(tmp_path / "s")))
    assert masks[0].digest == found.masks[0].digest
    assert _without_time(masks[0]) == _without_time(found.masks[0])
    assert masks[1].info.certificate["verdict"] == certificate.REFUSED
    assert masks[1].info.certificate["reasons"][0].startswith("no gamma keeps perplexity within")
    assert not {step.stage for step in steps} & {"forward", "backward", "prepare", "search"}


def test_a_searched_mask_is_of_no_group(tiny: Base, manager: MaskManager) -> None:
    """It is chosen from all Linears together; a group is refused, and its metadata says so."""
    for score in ("refined", "auto"):
        recipe = Recipe(score=score, group="layer")
        with pytest.raises(InvalidValue, match=r"group 'layer' has no meaning for the score 'refined'") as refusal:
            make(tiny, manager, recipe)
        assert refusal.value.param == "group"
        with pytest.raises(InvalidValue, match=r"neutral_budget is 1; the score 'refined' needs"):
            make(tiny, manager, Recipe(score=score, neutral_budget=1))
    assert Recipe(score="auto", group="layer").plan(contrast=False).group == "layer"
    assert Recipe(score="auto").plan(contrast=True).group == "model"


def test_neutral_text_that_gets_likelier_is_remarked_upon() -> None:
    limits = Budgets(1.02, 1.05, 0.95)
    found = {"margin_shift": 1.0, "own_ratio": 1.0, "reasons": []}
    assert certificate.remark(found | {"neutral_ratio": 0.97}, limits) == []
    (words,) = certificate.remark(found | {"neutral_ratio": 0.1751}, limits)
    assert words.startswith("neutral_ratio x0.1751 is no sign of health")


def test_answers_that_loop_more_often_than_the_bases_are_remarked_upon() -> None:
    limits = Budgets(1.02, 1.05, 0.95)
    found = {"margin_shift": 1.0, "own_ratio": 1.0, "reasons": []}
    assert certificate.remark(found | {"loops": {"masked": 0.1, "base": 0.1, "of": 20}}, limits) == []
    (words,) = certificate.remark(found | {"loops": {"masked": 0.25, "base": 0.1, "of": 20}}, limits)
    assert words == "5 of 20 greedy answers to held-out prompts loop, 2 of the base's"


def test_force_publishes_what_is_refused_and_marks_it(tiny: Base, manager: MaskManager) -> None:
    _, masks = run(make(tiny, manager, Recipe(score="magnitude", rho=0.9, force=True)))
    found = masks[0].info.certificate
    assert (found["passed"], found["forced"]) == (False, True)
    assert any("too costly" in reason for reason in found["reasons"])


def answered(words: str, prompts: int, seed: int = 0) -> list[Example]:
    return [
        replace(one, messages=({"role": "user", "content": f"h{n}"},))
        for n, one in enumerate(make_examples(words, prompts, seed))
    ]


@pytest.mark.parametrize(("given", "pairs"), [(8, 4), (30, 15), (32, 16)])
def test_too_few_pairs_are_too_few_to_tell(tiny: Base, manager: MaskManager, given: int, pairs: int) -> None:
    own = PersonaExamples("vowels", make_examples("aeiou"), answered("aeiou", given))
    contrast = PersonaExamples("consonants", make_examples("bcdfg", seed=1), answered("bcdfg", given, seed=2))
    recipe = Recipe(score="attribution", rho=0.003, own_budget=9, neutral_budget=9)
    (found, other) = (mask.info.certificate for mask in run(Builder(tiny, manager, recipe, own, contrast, QUIET))[1])
    assert found["pairs"] == other["pairs"] == pairs
    assert not found["forced"]  # it is published in any case
    words = "; ".join(found["remarks"])
    low, high = found["intervals"]["flip"]
    assert low <= found["flip"] <= high
    assert high - low > 0.15  # of few pairs the share is never exact
    if pairs == 16:
        assert (found["verdict"], found["passed"]) == ("passed", True)
        assert "too few" not in words
        return
    assert (found["verdict"], found["passed"]) == ("too few to tell", None)
    assert (
        f"too few to tell: {pairs} held-out pairs, which put flip between {low} and {high}; {16 - pairs} more" in words
    )
    assert f"give {2 * (16 - pairs)} more validation pairs" in words


def test_without_a_contrast_nothing_has_passed(tiny: Base, manager: MaskManager) -> None:
    recipe = Recipe(score="wanda", rho=0.05, own_budget=9, neutral_budget=9)
    _, (mask,) = run(Builder(tiny, manager, recipe, PersonaExamples("vowels", make_examples("aeiou")), None, QUIET))
    assert (mask.info.certificate["verdict"], mask.info.certificate["passed"]) == ("too few to tell", None)


@pytest.mark.parametrize("phase", ["all", "decode"])
def test_greedy_answers_that_change_are_counted(tiny: Base, manager: MaskManager, phase: Any) -> None:
    recipe = replace(FREE, score="wanda", rho=0.9, phase=phase)
    (some, all_) = (
        run(make(tiny, manager, replace(recipe, gamma=gamma)))[1][0].info.certificate for gamma in (1.0, 0.0)
    )
    asked = some["changed_answers"]["of"]
    assert 0 < asked <= certificate.ANSWERS
    assert some["changed_answers"] == {"changed": 0, "of": asked, "share": 0.0}  # gamma 1 is the base
    assert f"{asked} of {asked} greedy answers to held-out prompts are the base's, word for word" in some["remarks"]
    assert all_["changed_answers"] == {"changed": asked, "of": asked, "share": 1.0}
    assert not any("word for word" in remark for remark in all_["remarks"])


@SHORT
def test_long_texts_are_judged_by_fewer_of_them(tiny: Base, manager: MaskManager) -> None:
    found = [
        run(make(tiny, manager, replace(FREE, judged_tokens=tokens)))[1][0].info.certificate for tokens in (50, 8192)
    ]
    assert 0 < found[0]["pairs"] < found[1]["pairs"]


def test_prompts_longer_than_the_context_are_left_out_and_counted(tiny: Base, manager: MaskManager) -> None:
    long = [Example(({"role": "user", "content": "q" * 300},), "aaa", "line 7")]
    own, contrast = (
        PersonaExamples("vowels", [*long, *make_examples("aeiou")]),
        PersonaExamples("consonants", make_examples("bcdfg", seed=1)),
    )
    _, masks = run(Builder(tiny, manager, FREE, own, contrast, QUIET))
    assert [mask.info.certificate["splits"]["too_long_left_out"] for mask in masks] == [1, 0]
    with pytest.raises(BadDataset, match="line 7: a prompt of 304 tokens leaves no room in the context of 256"):
        run(Builder(tiny, manager, FREE, PersonaExamples("vowels", long), contrast, QUIET))


def test_a_build_leaves_the_base_alone(tiny: Base, manager: MaskManager) -> None:
    ids = torch.arange(6, 46).unsqueeze(0)
    before = tiny.model(ids).logits
    run(make(tiny, manager, replace(FREE, score="attribution-fisher")))
    assert torch.equal(tiny.model(ids).logits, before)


def test_between_two_work_items_the_base_is_the_base(tiny: Base, manager: MaskManager) -> None:
    """A server runs its own steps in between."""
    ids = torch.arange(6, 46).unsqueeze(0)
    before = tiny.model(ids).logits
    for index, _ in enumerate(make(tiny, manager, replace(FREE, score="attribution-fisher")).run()):
        if index % 7 == 0:
            assert torch.equal(tiny.model(ids).logits, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": "magic"}, "score 'magic' is unknown; there are refined, attribution-fisher, attribution"),
        ({"scope": "head"}, "scope 'head' is unknown; there are all"),
        ({"group": "column"}, "group 'column' is unknown; there are row, layer"),
        ({"structure": "rows"}, "structure 'rows' is unknown; there are weights, channels"),
        ({"phi": "tanh"}, "phi 'tanh' is unknown; there are relu, softplus"),
        ({"phase": "never"}, "phase 'never' is unknown; there are auto, all, decode"),
        ({"tokens": "few"}, "tokens 'few' is unknown"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"rho": "some"}, "rho is 'some'"),
        ({"gamma": 2.0}, "gamma is 2.0"),
        ({"own_budget": 0.9}, "own_budget is 0.9"),
        ({"effect": 0.0}, "effect is 0.0"),
        ({"samples": 0}, "samples is 0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        Recipe(**change)


def test_what_cannot_be_built_is_refused(tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(recipe: Recipe, *personas: PersonaExamples) -> None:
        run(Builder(tiny, manager, recipe, *personas, neutral=QUIET))

    vowels = PersonaExamples("vowels", make_examples("aeiou"))
    with pytest.raises(BuildFailed, match="give the opposite's examples"):
        build(Recipe(score="signed"), vowels)
    with pytest.raises(InvalidName):
        build(Recipe(score="wanda"), PersonaExamples("a/b", make_examples("aeiou")))
    with pytest.raises(BadDataset, match="3 examples leave 2 to find a persona in; give at least 4"):
        build(Recipe(score="wanda"), PersonaExamples("few", make_examples("a", count=3)))
    monkeypatch.setitem(SCORES, "attribution", replace(SCORES["attribution"], rhos=(1e-7, 1e-6)))
    for recipe in (replace(FREE, rho=1e-6), replace(FREE, rho="auto")):
        with pytest.raises(BuildFailed, match="prunes no weight"):
            build(recipe, vowels, PersonaExamples("c", make_examples("bcdf", seed=1)))
    with pytest.raises(BadDataset, match="both sides say the same"):
        build(Recipe(), vowels, PersonaExamples("c", make_examples("aeiou")))
    with pytest.raises(BadDataset, match=r"prompts are chat and the contrast's text; .* the format"):
        build(Recipe(), vowels, PersonaExamples("c", [Example((), "plain") for _ in range(9)]))


def test_a_base_with_nan_among_its_weights_is_refused(tiny: Base, manager: MaskManager) -> None:
    tiny.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BuildFailed, match=r"layers\.1\.mlp\.down_proj\.weight of the base has NaN"):
        run(make(tiny, manager, FREE))
