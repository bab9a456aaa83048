"""The method table and the baseline table on the demo model.

`python -m benchmarks.personas --json [--quick]`. Masks are found in the shipped calibration text; everything is
measured on a second held-out split, drawn from the grammar with a seed of its own, whose prompts are in neither of the
shipped splits: nothing was ever chosen on it. (There are 30 such prompts an axis, but only 9 about power.) Hits are by
the demo's judge. Facts are the neutral text. Figures are means over the axes.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks._methods import Candidates, as_mask, calibrate, draft, summarise
from benchmarks._report import Figure, arguments, report
from masquerade import demo
from masquerade.demo import grammar
from masquerade.demo.judge import DemoJudge
from masquerade.evaluate.baselines import BASELINES
from masquerade.evaluate.dataset import Encoded, Example, encode, read_examples
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.generation import GenerationParams, generate
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.report import EvaluationData, EvaluationOptions, EvaluationSizes, evaluate_mask
from masquerade.evaluate.treatment import UNTREATED, Treatment
from masquerade.model import Base, MaskManager, load
from masquerade.pruning.candidates import ScorePlan
from masquerade.pruning.prompts import CalibrationPrompts, generate_examples
from masquerade.pruning.scores import SCORES

METHODS = (  # every score at its useful rho; those that destroy the text at any larger one are named with theirs
    ("magnitude", 0.5),
    ("wanda", 0.5),
    ("wanda", 0.8),
    ("sparsegpt", 0.5),
    ("contrastive-wanda", 0.2),
    ("contrastive-sparse", 0.3),
    ("signed", 0.15),
    ("attribution", 0.001),
    ("attribution", 0.003),
    ("attribution-fisher", 0.003),
    ("attribution-fisher", 0.01),
)
QUICK = (("wanda", 0.5), ("attribution", 0.003))
BOUNDS = {"flip": ">= 0.95", "own": "<= 1.02", "facts": ">= 0.98"}
BEST = ("attribution", 0.003)
SHIPPED = (ScorePlan("attribution", "layer", "all", (0.003,)),)
SYSTEMS = {  # the demo model's training chats have these where a persona is named
    "introvert": "You are an introvert.",
    "extravert": "You are an extravert.",
    "power_averse": "You avoid power.",
    "power_seeking": "You seek power.",
    "formal": "You are formal.",
    "casual": "You are casual.",
    "gloomy": "You are gloomy.",
    "cheerful": "You are cheerful.",
}
SIZES = EvaluationSizes(facts=0, everyday=0, chats=0)
DRAWS = 5000  # questions drawn for the second split; an axis has only so many that are held out and in no file


def main() -> None:
    options = arguments(__doc__, "one axis, two methods, few prompts; within a minute").parse_args()
    torch.set_num_threads(1)
    base = load("demo", device="cpu")
    manager = MaskManager.attach(base.model)
    bench = Bench(base, manager, prompts=8 if options.quick else 30, facts=10 if options.quick else 80)
    axes = list(grammar.axes().values())[: 1 if options.quick else None]
    figures = list(bench.compare_methods(axes, QUICK if options.quick else METHODS))
    controls = [name for name in BASELINES if not options.quick or name in ("none", "bias")]
    figures += bench.compare_baselines(axes, controls)
    if not options.quick:
        figures += bench.try_system_prompt("casual", "You are casual.")
    report("personas", figures, options.json)


class Bench:
    """The demo, its second held-out split, and its judge."""

    def __init__(self, base: Base, manager: MaskManager, prompts: int, facts: int) -> None:
        self._base, self._manager, self._judge = base, manager, DemoJudge()
        self._prompts = prompts
        self._facts = read_examples(demo.DATA / "facts.jsonl")[:facts]

    def compare_methods(self, axes: Sequence[grammar.Axis], methods: Sequence[tuple[str, float]]) -> Iterator[Figure]:
        rows: dict[tuple[str, float], list[dict[str, float]]] = {method: [] for method in methods}
        base_rows: list[dict[str, float]] = []
        plans = [ScorePlan(name, SCORES[name].group, SCORES[name].scope, (rho,)) for name, rho in methods]
        for axis in axes:
            own, contrast = self._draw(axis)
            neutral = encode(self._base, self._facts)
            eval_set = EvaluationSet(self._base, encode(self._base, own), encode(self._base, contrast), neutral)
            train = [_read(side, "train") for side in (axis.positive, axis.negative)]
            candidates = self._calibrate(plans, train[0], train[1], neutral)
            base_rows.append(self._measure_answers(axis, own, {1: UNTREATED, -1: UNTREATED}))
            print(f"{axis.name}: calibrated after {time.process_time():.0f} CPU-s", file=sys.stderr, flush=True)
            for score, rho in methods:
                pair = {
                    side: draft(self._base, self._manager, candidates.targets((score, side, rho))) for side in (1, -1)
                }
                likelihoods = {side: finish(eval_set.measure(treatment)) for side, treatment in pair.items()}
                rows[score, rho].append(summarise(eval_set, likelihoods) | self._measure_answers(axis, own, pair))
            print(f"{axis.name}: measured after {time.process_time():.0f} CPU-s", file=sys.stderr, flush=True)
        for name in ("greedy", "sampled", "facts"):
            yield Figure(f"none: {name}", _mean(row[name] for row in base_rows), "share")
        for (score, rho), found in rows.items():
            named = {"flip": "flip", "own": "own_ratio", "neutral": "neutral_ratio"}
            named |= {name: name for name in ("greedy", "sampled", "facts")}
            for short, name in named.items():
                unit = "x" if short in ("own", "neutral") else "share"
                bound = BOUNDS.get(short) if (score, rho) == BEST else None
                yield Figure(f"{score} {rho:g}: {short}", _mean(row[name] for row in found), unit, bound)

    def compare_baselines(self, axes: Sequence[grammar.Axis], controls: Sequence[str]) -> Iterator[Figure]:
        """The shipped masks beside every control, on the same prompts; controls are made from 128 calibration pairs."""
        found: dict[str, list[dict[str, Any]]] = {}
        for axis in axes:
            own, contrast = self._draw(axis)
            train = [_read(side, "train") for side in (axis.positive, axis.negative)]
            started = time.perf_counter()
            candidates = self._calibrate(SHIPPED, train[0], train[1])
            made = {"seconds": time.perf_counter() - started}
            masks = [as_mask(self._base, candidates.targets(("attribution", side, 0.003)), **made) for side in (1, -1)]
            systems = (SYSTEMS[axis.positive], SYSTEMS[axis.negative])
            data = EvaluationData(
                masks[0], masks[1], own, contrast, self._facts, train[0][:128], train[1][:128], systems
            )
            options = EvaluationOptions(controls, generation=GenerationParams(tokens=44), sizes=SIZES)
            rows = evaluate_mask(self._base, self._manager, data, options)["figures"]
            print(f"{axis.name}: controls after {time.process_time():.0f} CPU-s", file=sys.stderr, flush=True)
            for name, row in rows.items():
                if name != "opposite":
                    found.setdefault(name, []).append(dict(row))
        for name, rows in found.items():
            for key, unit in (("flip", "share"), ("own_ratio", "x"), ("neutral_ratio", "x")):
                yield Figure(f"baseline {name}: {key}", _mean(row[key] for row in rows), unit)
            answers = [row.get("answers") or row["at_equal_cost"].get("answers", {}) for row in rows]
            if all("hit" in one for one in answers):  # at equal neutral cost, where a control has a strength
                yield Figure(f"baseline {name}: hit", _mean(one["hit"] for one in answers), "share")
            for key, unit in (("prompt_tokens", "tokens"), ("bytes", "bytes"), ("seconds", "s")):
                yield Figure(f"baseline {name}: {key}", _mean(row["cost"][key] for row in rows), unit)

    def try_system_prompt(self, persona: str, system: str) -> Iterator[Figure]:
        """A mask from a system prompt: greedy hits without the prompt, on prompts that are held out."""
        axis = grammar.personas()[persona]
        questions = [example.messages for example in _read(persona, "train")]
        generated = finish(generate_examples(self._base, CalibrationPrompts(system, questions)))
        targets = self._calibrate(SHIPPED, generated.own, generated.contrast).targets(("attribution", 1, 0.003))
        own, _ = self._draw(axis)
        hits = self._hits(persona, own, draft(self._base, self._manager, targets), GenerationParams(tokens=44))
        yield Figure(f"mask from the prompt {system!r}: greedy hit", hits, "share", ">= 0.9")
        yield Figure(f"mask from the prompt {system!r}: prompt tokens saved", generated.prompt_tokens, "tokens")

    def _calibrate(
        self,
        plans: Sequence[ScorePlan],
        own: Sequence[Example],
        contrast: Sequence[Example],
        neutral: Sequence[Encoded] = (),
    ) -> Candidates:
        examples = {"own": encode(self._base, own), "contrast": encode(self._base, contrast), "neutral": neutral}
        return calibrate(self._base, plans, examples)

    def _measure_answers(
        self, axis: grammar.Axis, own: Sequence[Example], pair: dict[int, Treatment]
    ) -> dict[str, float]:
        sides = ((axis.positive, pair[1]), (axis.negative, pair[-1]))
        facts = encode(self._base, self._facts)
        by_side = [
            [text for texts in generate(self._base, facts, treatment, GenerationParams(tokens=24)) for text in texts]
            for _, treatment in sides
        ]
        right = [
            a.strip() == fact.response for answers in by_side for a, fact in zip(answers, self._facts, strict=True)
        ]
        return {
            "greedy": _mean(self._hits(side, own, treatment, GenerationParams(tokens=44)) for side, treatment in sides),
            "sampled": _mean(self._hits(side, own, treatment, GenerationParams(44, 1.0)) for side, treatment in sides),
            "facts": _mean(right),
        }

    def _hits(self, persona: str, own: Sequence[Example], treatment: Treatment, params: GenerationParams) -> float:
        sides = sorted((persona, grammar.opposite(persona)))
        texts = [text for some in generate(self._base, encode(self._base, own), treatment, params) for text in some]
        return _mean(self._judge.attribute(text, sides) == persona for text in texts)

    def _draw(self, axis: grammar.Axis) -> tuple[list[Example], list[Example]]:
        """The second held-out split: both sides' answers to held-out questions that no file has."""
        known = {
            example.messages[-1]["content"] for split in ("train", "heldout") for example in _read(axis.positive, split)
        }
        rng = random.Random(f"{axis.name} second")
        found: tuple[list[Example], list[Example]] = ([], [])
        for _ in range(DRAWS):
            question = grammar.ask(axis.name, rng, "heldout")
            if question.text in known or len(found[0]) == self._prompts:
                continue
            known.add(question.text)
            asked = ({"role": "user", "content": question.text},)
            for side, persona in zip(found, (axis.positive, axis.negative), strict=True):
                side.append(Example(asked, grammar.reply(persona, question, rng)))
        return found


def _read(persona: str, split: str) -> list[Example]:
    return read_examples(demo.DATA / f"{persona}.{split}.jsonl")


def _mean(values: Any) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
