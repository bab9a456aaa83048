"""Greedy tokens of Masquerade's own engine, for `test_numbers.py`; run by a Python that has Masquerade.

Arguments: model and store. Standard input is JSON: a list of [prompt, persona or null]; standard output is JSON too.
"""

import json
import sys

from maskstore import Registry
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.model import AppliedMask, MaskManager, load

COUNT = 24


def main() -> None:
    base = load(sys.argv[1], device="cpu")
    registry, manager, fitted = Registry(sys.argv[2]), MaskManager.attach(base.model), {}
    engine, requests = Engine(base, EngineConfig()), []
    for prompt, name in json.load(sys.stdin):
        applied, phase = None, "all"
        if name:
            mask = registry.store.open(registry.resolve(name).digest, base=base.fingerprint)
            fitted.setdefault(name, manager.fit(mask))
            applied, phase = AppliedMask(fitted[name], mask.info.gamma), mask.info.phase
        sampling = SamplingParams(temperature=0)
        requests.append(Request(prompt, COUNT, lambda _: None, applied, phase, sampling))
    print(json.dumps(engine.generate(requests)))
    engine.stop()


if __name__ == "__main__":
    main()
