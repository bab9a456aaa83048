"""Which pooling finds the answer to a question: the 200 packaged facts, by the cosine of their embeddings.

`python -m benchmarks.embeddings --model FOLDER`. Prints, for each pooling, the mean reciprocal rank of a question's own
answer among the answers of all facts, and how often it is the first.
"""

from __future__ import annotations

import argparse

import numpy as np

from masquerade.engine import Embedding, Engine, Pooling, Request, Vector
from masquerade.evaluate.facts import read_facts
from masquerade.model import MaskManager, load

POOLINGS: tuple[Pooling, ...] = ("mean", "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    base = load(parser.parse_args().model, device="cpu")
    MaskManager.attach(base.model)
    engine, facts = Engine(base), read_facts("all")

    def embed(texts: list[str], pooling: Pooling) -> Vector:
        embeddings = [Embedding(pooling) for _ in texts]
        engine.generate(
            Request(base.tokenizer(text).input_ids, 0, lambda _: None, embedding=embedding)
            for text, embedding in zip(texts, embeddings, strict=True)
        )
        return np.stack([one.vector for one in embeddings if one.vector is not None])

    for pooling in POOLINGS:
        questions = embed([fact.question for fact in facts], pooling)
        similarity = questions @ embed([fact.answers[0] for fact in facts], pooling).T
        ranks = (similarity >= similarity.diagonal()[:, None]).sum(1)
        print(f"{pooling}: mean reciprocal rank {(1 / ranks).mean():.3f}, first {(ranks == 1).mean():.3f}")


if __name__ == "__main__":
    main()
