"""A model whose layers are divided among devices, emulated ones, computes what it does on one."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.errors import StateConflict, UnusableModel
from masquerade.model import AppliedMask, Base, MaskManager, find_layers, find_stages, find_targets, load
from masquerade.model.placement import Placement, divide, place
from masquerade.service import building
from tests import families, world
from tests.devices import EmulatedDevices

COUNT = 6
DENSE = [name for name, (_, changes) in families.FAMILIES.items() if not families.has_experts(changes)]
PROMPTS = [[(7 * place + place**2) % 250 + 6 for place in range(start, start + n)] for start, n in ((0, 40), (5, 9))]


def devices(kind: str, count: int) -> list[torch.device]:
    return [torch.device(kind, number) for number in range(count)]


def test_the_largest_part_is_as_small_as_possible() -> None:
    """Against all ways to cut a list."""
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randrange(1, 9) for _ in range(rng.randrange(1, 7))]
        rest, parts = rng.randrange(0, 12), rng.randrange(1, 5)
        found = divide(sizes, rest, parts)
        assert found == sorted(found)
        assert found[-1] < parts

        def largest(cut: Any, sizes: list[int] = sizes, rest: int = rest) -> int:
            sums = [sum(size for size, one in zip(sizes, cut, strict=True) if one == part) for part in range(4)]
            return max(sums[0] + rest, *sums[1:])

        every = [cut for cut in product(range(parts), repeat=len(sizes)) if list(cut) == sorted(cut)]
        assert largest(found) == min(map(largest, every))


def test_operations_across_emulated_devices_fail() -> None:
    with EmulatedDevices("xpu"):
        one, other = torch.ones(2, device="xpu:0"), torch.ones(2).to("xpu:1")
        with pytest.raises(RuntimeError, match="xpu:0, xpu:1"):
            one + other
        with pytest.raises(RuntimeError, match="cpu, xpu:0"):
            one + torch.ones(2)
        assert (one + other.to("xpu:0")).device == torch.device("xpu:0")
        assert (one * 2 + torch.tensor(1.0)).tolist() == [3, 3]


@pytest.mark.parametrize("name", DENSE)
def test_every_family_on_two_devices(name: str, tmp_path: Path) -> None:
    """A base row, a list and a bitmap, in both phases, in chunks; each mask beside its layers. Experts are left out:
    what transformers calls for them on an accelerator does not run in host memory.
    """
    folder = families.make_family(tmp_path, name)
    base, plain = load(str(folder), device="cpu"), AutoModelForCausalLM.from_pretrained(folder)
    masks = [None, world.make_mask(base, 0.02, 1), world.make_mask(base, 0.3, 1)]
    first, second = devices("xpu", 2)
    with EmulatedDevices("xpu"):
        Placement(first, [first, second]).apply(base.model)
        assert [stage.device for stage in find_stages(base.model)] == [first, second]
        assert base.devices == [first, second]
        manager = MaskManager.attach(base.model)
        worn = [mask and AppliedMask(manager.fit(mask), 0.25) for mask in masks]
        requests = [
            Request(prompt, COUNT, lambda _: None, applied, phase, SamplingParams(temperature=0))  # type: ignore[arg-type]
            for prompt, phase in zip(PROMPTS, ("all", "decode"), strict=True)
            for applied in worn
        ]
        engine = Engine(base, EngineConfig(max_batch_tokens=32))
        answers = engine.generate(requests)
        engine.stop()
    for request, mask, answer in zip(requests, masks * 2, answers, strict=True):
        worn_model = world.materialise(plain, mask, 0.25)
        assert world.speak(plain, worn_model, list(request.prompt), COUNT, phase=request.phase).agrees(answer)


def test_the_kernels_for_cuda_on_three_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in Triton's interpreter: tables of slots, paged decodes and packed prompts, on each device its own."""
    pytest.importorskip("triton")
    from masquerade.engine.cuda import paged

    monkeypatch.setattr(paged, "_PROGRAMS", 1)
    base = load(str(world.make_model(tmp_path, num_hidden_layers=5)), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    masks = [None, world.make_mask(base, 0.003, 1), world.make_mask(base, 0.3, 2)]
    with EmulatedDevices("cuda"):
        place(base.model, devices("cuda", 3)).apply(base.model)
        manager = MaskManager.attach(base.model)
        worn = [mask and AppliedMask(manager.fit(mask), 0.25) for mask in masks]
        kinds = {type(one).__name__ for applied in worn if applied for one in applied.mask.corrections.values()}
        assert kinds == {"CudaList", "CudaBits"}
        requests = [
            Request(PROMPTS[1], 3, lambda _: None, applied, sampling=SamplingParams(temperature=0)) for applied in worn
        ]
        engine = Engine(base, EngineConfig(max_batch_tokens=16, max_running=8))
        answers = engine.generate(requests)
        engine.stop()
    for mask, answer in zip(masks, answers, strict=True):
        assert world.speak(plain, world.materialise(plain, mask, 0.25), PROMPTS[1], 3).agrees(answer)


def test_parameters_are_where_their_layers_are(tmp_path: Path) -> None:
    """All that is outside of layers is on the first device, and so are inputs and outputs."""
    base = load(str(world.make_model(tmp_path, num_hidden_layers=5)), device="cpu")
    first, second = devices("xpu", 2)
    with EmulatedDevices("xpu"):
        found = place(base.model, [first, second])
        found.apply(base.model)
        for number, layer in enumerate(find_layers(base.model)):
            assert {weight.device for weight in layer.parameters()} == {found.layers[number]}
        assert all(linear.weight.device == found.find(name) for name, linear in find_targets(base.model).items())
        assert base.model.lm_head.weight.device == base.model.model.norm.weight.device == first
        assert base.model(torch.ones(1, 4, dtype=torch.int64, device=first)).logits.device == first
    assert [*found.layers] == [first, first, second, second, second]


def test_weights_count_as_they_are_quantised(tmp_path: Path) -> None:
    """In 4 bits the layers are small beside the embeddings, so fewer of them are beside these."""
    shape = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 256}
    base = load(str(world.make_model(tmp_path, **shape)), device="cpu")
    first, second = devices("cuda", 2)
    dense, quantised = (place(base.model, [first, second], how).layers for how in (None, "nf4"))
    assert [*dense].count(first) > [*quantised].count(first)


def test_a_divided_base_builds_nothing(tiny: Base) -> None:
    building.check_base(tiny)
    with EmulatedDevices("xpu"):
        Placement(torch.device("xpu:0"), devices("xpu", 2)).apply(tiny.model)
        with pytest.raises(StateConflict, match="divided among 2 devices"):
            building.check_base(tiny)


def test_more_devices_than_layers(tiny: Base) -> None:
    with pytest.raises(UnusableModel, match=r"--split-layers 3.*has 2"):
        place(tiny.model, devices("cuda", 3))


@pytest.mark.parametrize(("device", "reason"), [("cpu", "leave out `--device cpu`"), ("auto", "torch sees")])
def test_gpus_that_are_not_there(tiny_folder: Path, device: str, reason: str) -> None:
    with pytest.raises(UnusableModel, match=reason):
        load(str(tiny_folder), device=device, split_layers=2 + torch.cuda.device_count())
