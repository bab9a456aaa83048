"""Text that has nothing to do with any persona, for measuring what a mask costs.

Knows everyday questions, and has the base answer them. Refuses to know what is measured on the answers.
"""

from __future__ import annotations

from collections.abc import Generator

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.generation import answer
from masquerade.evaluate.metrics import perplexity, read_likelihoods
from masquerade.model import Base

SURE = 1.2  # perplexity up to which a base is sure of its own greedy answer; the demo talks as somebody from 1.28 on
FEWEST = 12  # answers that are kept in any case
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


def ask_base(base: Base) -> Generator[None, None, list[Encoded]]:
    """The base's own greedy answers to `QUESTIONS`, as far as it is sure of them.

    Where a base has no answer it talks as somebody, and a persona rightly changes that: such text is not neutral.
    """
    examples = [Example(({"role": "user", "content": question},), "?") for question in QUESTIONS]
    answers: list[Example] = []
    for texts in answer(base, encode(base, examples)):
        asked = examples[len(answers) : len(answers) + len(texts)]
        answers += [Example(one.messages, text.strip()) for one, text in zip(asked, texts, strict=True)]
        yield
    encoded = encode(base, [one for one in answers if one.response])
    if not encoded:
        raise BuildFailed("the base has no answer to any of the built-in questions; give neutral text (--neutral)")
    return (yield from _keep_sure(base, encoded))


def _keep_sure(base: Base, answers: list[Encoded]) -> Generator[None, None, list[Encoded]]:
    """Answers of a perplexity up to `SURE`, in their order; the `FEWEST` surest where fewer are."""
    likelihoods = yield from read_likelihoods(base, answers)
    doubts = [perplexity([likelihood]) for likelihood in likelihoods]
    bound = max(SURE, *sorted(doubts)[:FEWEST])
    return [answer for answer, doubt in zip(answers, doubts, strict=True) if doubt <= bound]
