"""The CUDA kernels against the formula in float64: on a CUDA device if there is one, else in Triton's interpreter.

The interpreter multiplies bf16 wrongly, so bf16 is only checked on a device.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskstore import Bitmap, MaskInfo, Target, encode
from masquerade.kernels import correct, cuda
from masquerade.kernels.cuda import CudaBits, CudaList, tile
from masquerade.model import AppliedMask, ResidentMask, Route, Span
from masquerade.model.cuda import SlotMap, SlotRoute, Slots, merge_linears

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if CUDA else {})
SHAPES = [(32, 64), (3, 17), (70, 130)]  # the last two have ragged columns
NAME = "model.layers.0.mlp.up_proj"


def make_linear(out: int, columns: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    torch.manual_seed(out * columns)
    return nn.Linear(columns, out, bias=bias).to(DEVICE, dtype).requires_grad_(False)


def prune(linear: nn.Linear, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(tuple(linear.weight.shape)) < share


def fit(linear: nn.Linear, target: Target) -> CudaBits | CudaList:
    return CudaBits(linear, target) if isinstance(target, Bitmap) else CudaList(linear, target)


def applied(linear: nn.Linear, target: Target, digest: str) -> ResidentMask:
    return ResidentMask(digest, MaskInfo(persona="p", score="random"), {NAME: fit(linear, target)})


def gate(pruned: np.ndarray, gamma: float) -> Tensor:
    """M + gamma (1 - M), eq. 7."""
    return torch.from_numpy(np.where(pruned, gamma, 1.0)).to(DEVICE)


def serve(route: Slots | SlotRoute, linear: nn.Linear, x: Tensor) -> Tensor:
    """What the model does."""
    return route.multiply(NAME, x, linear.weight, linear.bias)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_masks_correction_equals_the_formula(shape: tuple[int, int], share: float, dtype: torch.dtype) -> None:
    linear = make_linear(*shape, dtype)
    pruned = prune(linear, share, seed=7)
    target = encode(pruned)
    for rows in (1, 5):
        x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
        expected = x.double() @ (linear.weight.double() * torch.from_numpy(pruned).to(DEVICE)).T
        scale = x.double().abs() @ linear.weight.double().abs().T
        for form in (target.to_sparse(), target.to_bitmap()):
            correction = fit(linear, form)
            found = correction(x)
            assert ((found.double() - expected).abs() <= 1e-6 * scale).all()
            assert correction.nbytes == correction.footprint(linear, int(pruned.sum()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "rows"), [((40, 100), 12), ((70, 130), 3), ((32, 64), 40)], ids=str)
@pytest.mark.parametrize("forms", ["lists", "bitmaps", "both"])
def test_a_batch_of_masks_equals_the_formula(shape: tuple[int, int], rows: int, forms: str, dtype: torch.dtype) -> None:
    """Base rows, empty and full masks, one mask in several places and at several gammas, in no order."""
    linear = make_linear(*shape, dtype, bias=True)
    masks = []
    for number, share in enumerate((0.003, 0.1, 0.5, 0.0, 1.0)):
        pruned = prune(linear, share, seed=number)
        target = encode(pruned)
        as_bitmap = forms == "bitmaps" or (forms == "both" and number % 2)
        masks.append((pruned, applied(linear, target.to_bitmap() if as_bitmap else target.to_sparse(), str(number))))
    rng = np.random.default_rng(rows)
    x = torch.randn(rows, shape[1], device=DEVICE).to(dtype)
    expected = linear.weight.new_empty(rows, shape[0], dtype=torch.float64)
    spans = []
    for row, gamma in zip(range(rows), itertools.cycle((0.0, 0.3, 1.0, 0.0, 0.75)), strict=False):
        weight, number = linear.weight.double(), int(rng.integers(-1, len(masks)))
        if number >= 0:
            pruned, mask = masks[number]
            spans.append(Span(AppliedMask(mask, gamma), row, row + 1))
            weight = weight * gate(pruned, gamma)
        expected[row] = x[row].double() @ weight.T + linear.bias.double()
    scale = x.double().abs() @ linear.weight.double().abs().T + 1
    found = serve(SlotRoute(spans), linear, x)
    assert ((found.double() - expected).abs() <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("form", ["list", "bitmap"])
def test_many_rows_of_a_mask_equal_the_formula(form: str) -> None:
    """A prompt: wide tiles, the last of them not full."""
    linear = make_linear(40, 100, torch.float32)
    pruned = prune(linear, 0.2, seed=1)
    target = encode(pruned)
    mask = applied(linear, target.to_bitmap() if form == "bitmap" else target.to_sparse(), "p")
    x = torch.randn(75, 100, device=DEVICE)
    route = SlotRoute([Span(AppliedMask(mask, 0.3), 2, 70), Span(AppliedMask(mask, 0.0), 71, 72)])
    found = serve(route, linear, x)
    expected = x.double() @ linear.weight.double().T
    expected[2:70] = x[2:70].double() @ (linear.weight.double() * gate(pruned, 0.3)).T
    expected[71] = x[71].double() @ (linear.weight.double() * gate(pruned, 0.0)).T
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("outs", [(70, 17, 33), (64, 64)], ids=str)
def test_merged_linears_equal_the_formula(outs: tuple[int, ...], rows: int) -> None:
    """Ragged blocks of outputs; Linears that a mask does not name, lists beside bitmaps, base rows and gammas."""
    parent = "model.layers.0."
    names = [parent + name for name in (("q_proj", "k_proj", "v_proj") if len(outs) == 3 else ("gate_proj", "up_proj"))]
    linears = {name: make_linear(out, 130, torch.float32, bias=True) for name, out in zip(names, outs, strict=True)}
    plain = {name: (one.weight.double(), one.bias.double()) for name, one in linears.items()}
    (merged,) = merge_linears({"model.layers.0.o_proj": make_linear(9, 130, torch.float32), **linears})
    prunings, masks = [], []
    for number in range(4):  # each leaves out a Linear, or none; forms alternate
        own = {
            name: prune(linears[name], 0.1, 9 * number + place) for place, name in enumerate(names) if place != number
        }
        corrections = {
            name: fit(linears[name], encode(pruned).to_bitmap() if (number + place) % 2 else encode(pruned).to_sparse())
            for place, (name, pruned) in enumerate(own.items())
        }
        prunings.append(own)
        masks.append(ResidentMask(str(number), MaskInfo(persona="p", score="random"), corrections))
    x = torch.randn(rows, 130, device=DEVICE)
    spans, expected = [], {name: x.double() @ weight.T + bias for name, (weight, bias) in plain.items()}
    for start in range(0, rows - 2, max(1, rows // 5)):
        number, gamma, stop = start % 4, (0.0, 0.3)[start % 2], start + max(1, rows // 5) - (rows > 5)
        spans.append(Span(AppliedMask(masks[number], gamma), start, stop))
        for name, pruned in prunings[number].items():
            weight, bias = plain[name]
            expected[name][start:stop] = x[start:stop].double() @ (weight * gate(pruned, gamma)).T + bias
    padded = Slots(SlotMap.of(spans, rows).padded_shape(rows + 3), DEVICE)
    padded.write(SlotMap.of(spans, rows))
    for route, given in ((SlotRoute(spans), x), (padded, torch.cat([x, x[:3]])), (Route(spans), x)):
        for name in names:
            found = merged.multiply(name, given, route)[:rows]
            assert torch.allclose(found.double(), expected[name], atol=1e-4), name
        assert merged._input is None


def test_corrections_of_torch_serve_merged_linears() -> None:
    """What `fit` makes if it is told to."""
    names = ("layers.0.gate_proj", "layers.0.up_proj")
    linears = {name: make_linear(32, 64, torch.float32) for name in names}
    pruned = {name: prune(linear, 0.1, seed) for seed, (name, linear) in enumerate(linears.items())}
    (merged,) = merge_linears(linears)
    for backend in ("sparse", "reference"):
        corrections = {name: correct(linears[name], encode(one), backend) for name, one in pruned.items()}
        mask = ResidentMask("p", MaskInfo(persona="p", score="random"), corrections)
        route, x = Route([Span(AppliedMask(mask, 0.25), 1, 3)]), torch.randn(3, 64, device=DEVICE)
        for name in names:
            weight = linears[name].weight.double()
            expected = x.double() @ weight.T
            expected[1:] = x[1:].double() @ (weight * gate(pruned[name], 0.25)).T
            assert torch.allclose(merged.multiply(name, x, route).double(), expected, atol=1e-5), backend


def test_merged_weights_stay_the_linears_own() -> None:
    """Each Linear computes what it did, merging again moves nothing, and others than alike are left alone."""
    names = ["layers.0.gate_proj", "layers.0.up_proj"]
    linears = {name: make_linear(32, 64, torch.float32) for name in names}
    x = torch.randn(3, 64, device=DEVICE)
    before = [linear(x) for linear in linears.values()]
    (first,) = merge_linears(linears)
    (again,) = merge_linears(linears)
    assert first.weight.data_ptr() == again.weight.data_ptr() == linears[names[0]].weight.data_ptr()
    assert torch.equal(again.weight, torch.cat([linear.weight for linear in linears.values()]))
    for linear, old in zip(linears.values(), before, strict=True):
        assert torch.equal(linear(x), old)
    odd = {names[0]: make_linear(32, 64, torch.float32), names[1]: make_linear(32, 64, torch.float32, bias=True)}
    assert not [*merge_linears(odd)]
    assert not [*merge_linears({names[0]: linears[names[0]]})]


def test_an_input_is_multiplied_anew_when_it_comes_again() -> None:
    """The outputs of merged Linears are those of the tensor and route that they are called with."""
    linears = {name: make_linear(32, 64, torch.float32) for name in ("layers.0.gate_proj", "layers.0.up_proj")}
    (merged,) = merge_linears(linears)
    gate_name, up_name = merged.names
    first, second = torch.randn(2, 3, 64, device=DEVICE)
    route = SlotRoute([])
    assert torch.equal(merged.multiply(gate_name, first, route), linears[gate_name](first))
    assert torch.allclose(merged.multiply(up_name, second, route), linears[up_name](second))
    assert torch.allclose(merged.multiply(up_name, second, route), linears[up_name](second))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_hard_mask_skips_what_it_prunes_beside_rows_that_do_not() -> None:
    """A weight that is not a number: pruned at gamma 0 it has no effect, at gamma 0.5 and for the base it has."""
    linear = make_linear(16, 32, torch.float32)
    pruned = np.zeros((16, 32), bool)
    pruned[3, 5] = True
    linear.weight.data[3, 5] = float("inf")
    mask = applied(linear, encode(pruned).to_bitmap(), "p")
    route = SlotRoute([Span(AppliedMask(mask, gamma), row, row + 1) for row, gamma in enumerate((0.0, 0.5, 0.0))])
    found = serve(route, linear, torch.ones(4, 32, device=DEVICE))
    assert found.isfinite().all(1).tolist() == [True, False, True, False]


def test_tensors_that_stay_put_serve_batch_after_batch() -> None:
    """What a captured graph relies on: another batch of the same shape is another result from the same addresses."""
    linear = make_linear(40, 100, torch.float32)
    pruned = [prune(linear, share, seed) for seed, share in enumerate((0.01, 0.5, 0.02))]
    forms = [encode(pruned[0]).to_sparse(), encode(pruned[1]).to_bitmap(), encode(pruned[2]).to_sparse()]
    masks = [applied(linear, form, str(number)) for number, form in enumerate(forms)]
    batches: list[list[tuple[int, float] | None]] = [
        [(0, 0.0), (1, 0.0), None],
        [(1, 0.4), (2, 0.0)],
        [None, (0, 0.0), (0, 0.3), (1, 0.0)],
        [],
    ]
    slot_maps = [
        SlotMap.of([Span(AppliedMask(masks[w[0]], w[1]), row, row + 1) for row, w in enumerate(batch) if w], len(batch))
        for batch in batches
    ]
    slots = Slots(slot_maps[0].padded_shape(4), DEVICE)
    assert {one.padded_shape(4) for one in slot_maps[:1] + slot_maps[2:3]} == {slots.shape}
    places = {name: tensor.data_ptr() for name, tensor in slots._staging.tensors.items()}
    x = torch.randn(4, 100, device=DEVICE)
    for batch, slot_map in zip(batches, slot_maps, strict=True):
        slots.write(slot_map)
        found = serve(slots, linear, x)
        expected = x.double() @ linear.weight.double().T
        for row, what in enumerate(batch):
            if what:
                number, gamma = what
                expected[row] = x[row].double() @ (linear.weight.double() * gate(pruned[number], gamma)).T
        assert torch.allclose(found.double(), expected, atol=1e-5)
        assert torch.equal(found, serve(slots, linear, x))
    assert places == {name: tensor.data_ptr() for name, tensor in slots._staging.tensors.items()}


def test_tiles_hold_every_row_once_beside_its_like() -> None:
    for seed, width in itertools.product(range(20), (1, 4, 16)):
        slots = np.random.default_rng(seed).integers(-1, 4, size=seed * 3).astype(np.int32)
        numbers, rows = tile(slots, width)
        assert sorted(rows[rows >= 0]) == list(range(len(slots)))
        for number, members in zip(numbers, rows, strict=True):
            assert members[0] >= 0
            assert set(slots[members[members >= 0]]) == {number}
        for number in set(slots):
            assert (numbers == number).sum() == -(-(slots == number).sum() // width)


def test_without_triton_torch_serves_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "masquerade.kernels.cuda.triton", raising=False)
    cuda.find_kernels.cache_clear()
    try:
        assert [cuda.find_kernels(), cuda.find_kernels()] == [None, None]
    finally:
        cuda.find_kernels.cache_clear()
    (record,) = caplog.records
    assert "masked products run on torch, which is slower" in record.getMessage()
