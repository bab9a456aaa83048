"""Generates neutral text, the base's answers to everyday questions, to measure the cost of a mask with."""

from __future__ import annotations

from collections.abc import Generator

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.generation import generate
from masquerade.evaluate.metrics import perplexity, read_likelihoods
from masquerade.model import Base

MAX_PERPLEXITY = 1.2  # of an answer that is kept; the demo's answers have a persona from 1.28 on
MIN_KEPT = 12  # answers that are kept in any case, those of lowest perplexity
QUESTIONS = (
    "What is the capital of France?",
    "What is two plus three?",
    "What colour is the sky?",
    "What is the opposite of hot?",
    "What day comes after Monday?",
    "What sound does a dog make?",
    "What is bread made of?",
    "How many days are there in a week?",
    "What is the capital of Japan?",
    "What colour is snow?",
    "What is paper made of?",
    "What is four plus four?",
    "What is the opposite of big?",
    "What sound does a cat make?",
    "How many legs does a spider have?",
    "Which month comes after June?",
    "Where does milk come from?",
    "What do bees make?",
    "How many hours are there in a day?",
    "What is the capital of Italy?",
    "What colour is a ripe banana?",
    "What is nine minus four?",
    "What is the opposite of early?",
    "Which season comes after winter?",
    "What is glass made of?",
    "How many wheels does a bicycle have?",
    "Which planet do we live on?",
    "What is ice?",
    "What is the capital of Spain?",
    "What do cows eat?",
    "How does a kettle work?",
    "Why do leaves fall in autumn?",
    "What is a library for?",
    "How do I boil an egg?",
    "What is the largest ocean?",
    "What does a baker do?",
    "How many minutes are there in an hour?",
    "What is a map?",
    "Why does it rain?",
    "What is the opposite of full?",
    "What is wood used for?",
    "Which animal is called the king of the jungle?",
    "What is ten divided by two?",
    "What is a bridge?",
    "How do fish breathe?",
    "What is the capital of Egypt?",
    "What is soap for?",
    "Which day comes before Sunday?",
)


def generate_neutral_text(base: Base) -> Generator[None, None, list[Encoded]]:
    """The base's own greedy answers to `QUESTIONS`, of low perplexity.

    Without a definite answer a base speaks in some persona's manner, which a mask is meant to change: not neutral text.
    """
    examples = [Example(({"role": "user", "content": question},), "?") for question in QUESTIONS]
    answers: list[Example] = []
    for texts in generate(base, encode(base, examples)):
        batch = examples[len(answers) : len(answers) + len(texts)]
        answers += [Example(one.messages, text.strip()) for one, text in zip(batch, texts, strict=True)]
        yield
    encoded = encode(base, [one for one in answers if one.response])
    if not encoded:
        raise BuildFailed("the base has no answer to any of the built-in questions; give neutral text (--neutral)")
    return (yield from _keep_confident(base, encoded))


def _keep_confident(base: Base, answers: list[Encoded]) -> Generator[None, None, list[Encoded]]:
    """The answers with a perplexity of at most `MAX_PERPLEXITY`, in order; at least `MIN_KEPT` of lowest perplexity."""
    likelihoods = yield from read_likelihoods(base, answers)
    perplexities = [perplexity([likelihood]) for likelihood in likelihoods]
    bound = max(MAX_PERPLEXITY, *sorted(perplexities)[:MIN_KEPT])
    return [answer for answer, value in zip(answers, perplexities, strict=True) if value <= bound]
