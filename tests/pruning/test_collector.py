"""Statistics that stream: the same numbers however the data is split, from the equations, one layer at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from masquerade.errors import BuildFailed
from masquerade.evaluate.dataset import Encoded, batches
from masquerade.model import Base, find_layers, find_targets
from masquerade.pruning.collector import CalibrationText, StatisticsCollector
from masquerade.pruning.hooks import find_added
from masquerade.pruning.moments import Moments
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import LinearStatistics, Role, Statistic

OWN = [Encoded((1, 20, 30), (40, 50, 2)), Encoded((1, 9), (8, 7, 6, 2)), Encoded((1,), (60, 61, 2))]
CONTRAST = [Encoded((1, 20, 30), (99, 98, 97, 2)), Encoded((1, 9), (88, 2))]
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
ALL: frozenset[Statistic] = frozenset({"channels", "hessian", "gradient", "squared_gradient"})


def collect(
    base: Base,
    tokens: int = 1000,
    scratch: Scratch | None = None,
    needs: frozenset[Statistic] = ALL,
    everything: bool = False,
) -> tuple[dict[str, LinearStatistics], dict[str, LinearStatistics]]:
    """LinearStatistics of the forward and of the backward pass."""
    examples: dict[Role, list[Encoded]] = {"own": OWN, "contrast": CONTRAST}
    texts = {
        role: CalibrationText(list(batches(all_, base.device, tokens, everything)), needs)
        for role, all_ in examples.items()
    }
    targets = {name: linear for name, linear in find_targets(base.model).items() if name in NAMES}
    collector = StatisticsCollector(base, targets, texts, scratch or Scratch())
    forward: dict[str, LinearStatistics] = {}
    backward: dict[str, LinearStatistics] = {}

    def keep(found: dict[str, LinearStatistics]) -> Iterator[None]:
        def on_layer(_: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
            found.update(statistics)
            yield from [1] * len(statistics)

        return on_layer  # type: ignore[return-value]

    assert sum(collector.forward(keep(forward))) == collector.forward_items  # type: ignore[arg-type]
    assert sum(collector.backward(keep(backward))) == collector.backward_items  # type: ignore[arg-type]
    return forward, backward


def log_likelihood(base: Base, examples: list[Encoded]) -> torch.Tensor:
    """Mean over response tokens, one example at a time, no padding."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        ids = torch.tensor([example.prompt + example.response])
        logs = base.model(ids, use_cache=False).logits[0].log_softmax(-1)
        for position in range(len(example.prompt), len(example)):
            total = total + logs[position - 1, ids[0, position]]
            tokens += 1
    return total / tokens


def inputs(base: Base, name: str, everything: bool = False) -> list[torch.Tensor]:
    """Of a Linear at the counted positions of each own example, float64."""
    seen: list[torch.Tensor] = []
    handle = base.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for example in OWN:
            base.model(torch.tensor([example.prompt + example.response]))
    handle.remove()
    starts = [0 if everything else len(example.prompt) - 1 for example in OWN]
    return [x[start : len(example) - 1] for x, start, example in zip(seen, starts, OWN, strict=True)]


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize("everything", [False, True])
def test_activations_count_what_they_should_and_no_padding(tiny: Base, tokens: int, everything: bool) -> None:
    forward, _ = collect(tiny, tokens, everything=everything)
    for name in NAMES:
        examples = inputs(tiny, name, everything)
        rows = torch.cat(examples)
        found = forward[name].own
        assert found.channels is not None
        assert found.hessian is not None
        assert torch.allclose(found.channels.norm.double(), rows.square().mean(0).sqrt(), rtol=1e-5)
        assert torch.allclose(found.channels.magnitudes.mean, rows.abs().mean(0), rtol=1e-5)
        levels = torch.stack([x.square().mean(0).sqrt() for x in examples])
        assert torch.allclose(found.channels.sequences.mean, levels.mean(0), rtol=1e-5)
        assert torch.allclose(found.channels.sequences.variance, levels.var(0, correction=0), rtol=1e-3, atol=1e-9)
        assert torch.allclose(found.hessian.double(), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_the_gradient_is_the_derivative(tiny: Base, tokens: int) -> None:
    """Against a central difference of the mean log-likelihood, in float64."""
    tiny.model.double()
    _, backward = collect(tiny, tokens)
    step = 1e-2  # norms round to fp32 inside the model, so a smaller step would measure rounding
    for name in NAMES:
        weight = tiny.model.get_submodule(name).weight
        for role, examples in (("own", OWN), ("contrast", CONTRAST)):
            gradient = getattr(backward[name], role).gradient
            for row, column in ((0, 0), (13, 50), (63, 45)):
                values = []
                for way in (1, -1):
                    weight.data[row, column] += way * step
                    with torch.no_grad():
                        values.append(float(log_likelihood(tiny, examples)))
                    weight.data[row, column] -= way * step
                expected = (values[0] - values[1]) / (2 * step)
                assert float(gradient[row, column]) == pytest.approx(expected, rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("needs", [ALL, frozenset({"gradient"})])
def test_a_gradient_of_zeros_says_nothing_of_the_next_ones(tiny: Base, needs: frozenset[Statistic]) -> None:
    """The first example is one that the base is certain of: its gradient is zero everywhere, to the bit."""
    tiny.model.lm_head.weight.data *= 4000
    ids, sure = [1, 20], []
    for _ in range(2):
        sure.append(int(tiny.model(torch.tensor([ids + sure]), use_cache=False).logits[0, -1].argmax()))
    examples: dict[Role, list[Encoded]] = {"own": [Encoded((1, 20), tuple(sure)), *OWN]}
    names = list(find_targets(tiny.model))
    weights = [tiny.model.get_submodule(name).weight.requires_grad_(True) for name in names]
    assert not any(map(torch.any, torch.autograd.grad(log_likelihood(tiny, examples["own"][:1]), weights)))
    expected = torch.autograd.grad(log_likelihood(tiny, examples["own"]), weights)
    for weight in weights:
        weight.requires_grad_(False)
    collector = StatisticsCollector(
        tiny,
        find_targets(tiny.model),
        {"own": CalibrationText(list(batches(examples["own"], tiny.device, 1)), needs)},
        Scratch(),
    )
    found: dict[str, LinearStatistics] = {}

    def keep(_: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
        found.update(statistics)
        yield from [1] * len(statistics)

    assert sum(collector.forward(lambda _, statistics: iter([1] * len(statistics)))) == collector.forward_items
    assert sum(collector.backward(keep)) == collector.backward_items
    for name, gradient in zip(names, expected, strict=True):
        close = torch.nn.functional.cosine_similarity(found[name].own.gradient.flatten(), gradient.flatten(), dim=0)
        assert close > 0.9999, name
        assert found[name].own.gradient.norm() == pytest.approx(float(gradient.norm()), rel=1e-3), name


def test_products_that_are_only_added_are_found_in_the_graph() -> None:
    x = torch.ones(2, 3, 4, requires_grad=True)
    added, scaled, used, twice, bent, narrow = (x * factor for factor in range(2, 8))
    output = x + added + 2 * scaled
    output = output + (used + used.sin()) + (twice + twice)
    output = output + bent.relu() + narrow[:, :, :1]
    made = {"added": added, "scaled": scaled, "used": used, "twice": twice, "bent": bent, "narrow": narrow}
    assert find_added(output, made) == ["added"]
    assert find_added(torch.add(x, added, alpha=3), made) == []


def test_a_layer_of_this_family_adds_one_product_of_its_mlp(tiny: Base) -> None:
    layer, made = find_layers(tiny.model)[0], {}
    for name, linear in layer.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_hook(lambda _, __, output, name=name: made.__setitem__(name, output))
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    output = layer(hidden, position_embeddings=tiny.model.model.rotary_emb(hidden, torch.arange(5)[None]))
    output = output[0] if isinstance(output, tuple) else output
    assert find_added(output, made) == ["mlp.down_proj"]


def test_the_squared_gradient_is_the_mean_square_of_the_gradient_by_position(tiny: Base) -> None:
    """Against one example at a time: the gradient of a Linear's output, outer product with its input, squared."""
    tiny.model.double()
    _, backward = collect(tiny)
    name = NAMES[1]
    linear, total, tokens = tiny.model.get_submodule(name), 0.0, 0
    for example in OWN:
        kept: list[torch.Tensor] = []

        def keep(_: object, args: tuple[torch.Tensor], output: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            output.retain_grad()  # type: ignore[no-untyped-call]
            kept += [args[0], output]

        linear.weight.requires_grad_(True)
        handle = linear.register_forward_hook(keep)
        (log_likelihood(tiny, [example]) * len(example.response)).backward()  # type: ignore[no-untyped-call]
        handle.remove()
        linear.weight.requires_grad_(False)
        assert kept[1].grad is not None
        for x, above in zip(kept[0][0], kept[1].grad[0], strict=True):
            total = total + torch.outer(above, x).square()
        tokens += len(example.response)
    found = backward[name].own.squared_gradient
    assert found is not None
    assert torch.allclose(found.double(), total / tokens, rtol=1e-4, atol=1e-9)  # type: ignore[arg-type]


def test_statistics_leave_the_model_as_it_was(tiny: Base) -> None:
    weights = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    ids = torch.arange(6, 46).unsqueeze(0)
    before = tiny.model(ids).logits
    collect(tiny)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny.model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in tiny.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tiny.model.modules())
    assert torch.equal(tiny.model(ids).logits, before)


def test_statistics_in_a_folder_are_those_in_memory_and_nothing_stays(tiny: Base, tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch")
    kept, remembered = collect(tiny, scratch=scratch), collect(tiny)
    for ways in zip(kept, remembered, strict=True):
        for name in NAMES:
            for kind in ("hessian", "gradient", "squared_gradient"):
                one, other = (getattr(way[name].own, kind) for way in ways)
                assert (one is None and other is None) or torch.equal(one, other)
    left = [path.parent.name for path in (tmp_path / "scratch").rglob("*.safetensors")]
    assert set(left) == {"done"}  # hidden states and gradients are gone
    scratch.close()
    assert not (tmp_path / "scratch").exists()


def test_a_folder_is_one_builds_at_a_time_and_free_when_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    first, second = Scratch(folder), Scratch(folder)
    first.put("done/forward-0", {"layer": torch.tensor(0)})
    for use in (lambda: "done/forward-0" in second, lambda: second.put("x", {}), lambda: second.get("done/forward-0")):
        with pytest.raises(BuildFailed, match="the same build is running already: another process works in"):
            use()
    second.close()
    assert (folder / "done" / "forward-0.safetensors").exists()  # it was not the second's to remove
    del first  # killed
    assert "done/forward-0" in second
    second.close()
    assert not folder.exists()


@pytest.mark.parametrize("in_a_folder", [True, False])
def test_what_is_not_to_be_retained_is_deleted(tmp_path: Path, in_a_folder: bool) -> None:
    scratch = Scratch(tmp_path / "s" if in_a_folder else None)
    names = ("found", "foundling", "written/1", "states/1/last", "start/1/a")
    for name in names:
        scratch.put(name, {"one": torch.ones(1)})
    scratch.retain("found", "written")
    assert [name in scratch for name in names] == [True, False, True, False, False]
    assert torch.equal(scratch.get("written/1")["one"], torch.ones(1))
    scratch.close()
    assert not (tmp_path / "s").exists()


def test_a_full_disk_is_said(tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(BuildFailed, match="No space left on device"):
        collect(tiny, scratch=Scratch(tmp_path))


def test_activations_that_overflow_are_said(tiny: Base) -> None:
    tiny.model.get_submodule(NAMES[1]).weight.data[0, 0] = float("nan")
    with pytest.raises(BuildFailed, match="statistics that are not finite"):
        collect(tiny, needs=frozenset({"hessian"}))


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_the_same_however_the_data_is_split(seed: int) -> None:
    data = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 100
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, 60), 7))
    parts = [Moments.of(part) for part in torch.tensor_split(data, cuts)]
    rng.shuffle(parts)
    while len(parts) > 1:
        parts = [parts[0].merge(parts[1]), *parts[2:]]
        rng.shuffle(parts)
    merged, exact = parts[0], data.double()
    assert merged.count == 60
    assert torch.allclose(merged.mean, exact.mean(0), rtol=1e-7)
    assert torch.allclose(merged.variance, exact.var(0, correction=0), rtol=1e-5)
    assert torch.allclose(merged.root_mean_square, exact.square().mean(0).sqrt(), rtol=1e-7)
