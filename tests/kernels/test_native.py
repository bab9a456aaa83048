"""The native kernels against float64: rows, threads and pruned weights that are not finite."""

from __future__ import annotations

import copy
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskstore import encode
from masquerade.errors import UnusableModel
from masquerade.kernels import NativeMask, NativeParts, NativeProduct, NativeSpan, correct, dense, native, serves
from masquerade.model import AppliedMask, Base, MaskManager, Span, load, make_route
from tests import world

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
ISAS = library.isas if (library := native.find_library()) else []
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
CPP = Path(native.__file__).parent / "cpp"


@dataclass(frozen=True)
class Part:
    """Rows of a batch that have one mask."""

    backend: str
    share: float  # pruned
    gammas: tuple[float, ...]  # one a row


parts = st.builds(
    Part,
    st.sampled_from(["bits", "list"]),
    st.sampled_from([0.0, 0.003, 0.05, 0.5, 1.0]),
    st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0]), min_size=1, max_size=20).map(tuple),
)


class Batch:
    """A Linear, rows in random order with the masks of the parts, and some of the base's."""

    def __init__(
        self,
        out: int,
        columns: int,
        dtype: torch.dtype,
        parts: Sequence[Part],
        base_rows: int,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.linear = nn.Linear(columns, out, bias=bias).to(dtype).requires_grad_(False)
        self.rows = base_rows + sum(len(part.gammas) for part in parts)
        self.x = torch.randn(self.rows, columns).to(dtype)
        places = torch.randperm(self.rows).split([base_rows, *(len(part.gammas) for part in parts)])
        weight, x = self.linear.weight.double(), self.x.double()
        self.expected = x @ weight.T
        self.masks: list[NativeMask] = []
        self.places: list[Tensor] = []  # of each mask's rows
        self.spans: list[NativeSpan] = []  # row by row
        for part, rows in zip(parts, places[1:], strict=True):
            pruned = rng.random((out, columns)) < part.share
            mask = correct(self.linear, encode(pruned), part.backend)
            assert isinstance(mask, NativeMask)
            self.masks.append(mask)
            self.places.append(rows)
            table = NativeParts({"this": mask}, {"other": 0, "this": 1})
            strength = 1 - torch.tensor(part.gammas).view(-1, 1)
            self.spans += [
                NativeSpan(table, float(by), int(row), int(row) + 1) for row, by in zip(rows, strength, strict=True)
            ]
            self.expected[rows] -= strength.double() * (x[rows] @ (weight * torch.from_numpy(pruned)).T)
        self.scale = x.abs() @ weight.abs().T
        if bias:
            self.expected += self.linear.bias.double()
            self.scale += self.linear.bias.double().abs()

    def multiply(self, isa: str | None = None) -> Tensor:
        product = NativeProduct(self.spans, isa)
        return product(self.x, self.linear.weight, self.linear.bias, product.find("this"))

    def alone(self, row: int, isa: str | None = None) -> Tensor:
        """The output of one row by itself."""
        product = NativeProduct([one._replace(start=0, stop=1) for one in self.spans if one.start == row], isa)
        return product(self.x[row : row + 1], self.linear.weight, self.linear.bias, product.find("this"))[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 70),
    st.one_of(st.integers(1, 200), st.sampled_from([64, 1024, 1100, 2050])),
    st.sampled_from(list(TOLERANCE)),
    st.lists(parts, max_size=5),
    st.sampled_from([0, 1, 2, 7, 26, 260, 530]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_products_equal_the_formula_and_no_row_depends_on_another(
    out: int, columns: int, dtype: torch.dtype, parts: list[Part], base_rows: int, bias: bool, seed: int
) -> None:
    batch = Batch(out, columns, dtype, parts, base_rows, bias, seed)
    for isa in ISAS:
        y = batch.multiply(isa)
        assert ((y.double() - batch.expected).abs() <= TOLERANCE[dtype] * (batch.scale + 1e-3)).all()
        for row in range(0, batch.rows, 1 + batch.rows // 12):
            assert torch.equal(batch.alone(row, isa), y[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [48, 331])
def test_what_earlier_calls_left_never_counts(
    dtype: torch.dtype, isa: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even times zero: here it is NaN."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # memory is a thread's own
    parts = [Part("list", 0.01, (0.0,) * 5), Part("bits", 0.5, (0.0, 0.3)), Part("bits", 0.5, (0.0,) * 9)]
    for base_rows in (1, 3, 40):
        earlier, batch = Batch(517, 1100, dtype, parts, 40), Batch(517, columns, dtype, parts, base_rows)
        earlier.x.fill_(float("nan"))
        assert earlier.multiply(isa).isnan().all()
        y = batch.multiply(isa)
        assert ((y.double() - batch.expected).abs() <= TOLERANCE[dtype] * (batch.scale + 1e-3)).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    parts = [Part("list", 0.01, (0.0,) * 5), Part("bits", 0.5, (0.0, 0.3)), Part("bits", 0.5, (0.0,) * 9)]
    batch, threads = Batch(517, 331, dtype, parts, 3), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(batch.multiply())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("columns", [65_535, 65_536, 70_000])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_columns_around_sixteen_bits(columns: int, share: float) -> None:
    """Where columns, and how many of them an output's list has, just fit into 16 bits, or do not."""
    batch = Batch(3, columns, torch.bfloat16, [Part("list", share, (0.0,)), Part("list", share, (0.5,) * 5)], 1)
    assert ((batch.multiply().double() - batch.expected).abs() <= 5e-3 * batch.scale).all()
    assert batch.masks[0].to_keep().sum() == 3 * columns - batch.masks[0].pruned


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("backend", ["bits", "list"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_a_hard_mask_prunes_never_counts(
    dtype: torch.dtype, backend: str, value: float, rows: int, isa: str
) -> None:
    """Rows of gamma 0 have the product without the pruned weights; others beside them do not."""
    share = 0.02 if backend == "list" else 0.5
    batch = Batch(21, 130, dtype, [Part(backend, share, (0.0,) * rows + (0.5,) * rows)], 2)
    pruned = batch.masks[0](torch.eye(130, dtype=dtype)).T != 0  # [out, in]
    clean = batch.multiply(isa)
    batch.linear.weight[pruned] = value
    y = batch.multiply(isa)
    hard, soft = batch.places[0].split(rows)
    assert pruned.any()
    assert torch.allclose(y[hard], clean[hard], atol=2e-2 if dtype is torch.bfloat16 else 1e-5)
    assert not y[soft][:, pruned.any(1)].isfinite().any()
    assert not dense(batch.x, batch.linear.weight, batch.linear.bias)[:, pruned.any(1)].isfinite().any()


def test_dense_products_of_fp32_are_torchs_to_the_bit() -> None:
    batch = Batch(40, 100, torch.float32, [], 5, bias=True)
    assert torch.equal(
        dense(batch.x, batch.linear.weight, batch.linear.bias),
        F.linear(batch.x, batch.linear.weight, batch.linear.bias),
    )


def test_what_does_not_fit_the_plan_is_refused() -> None:
    batch = Batch(8, 16, torch.float32, [Part("list", 0.1, (0.0, 0.0))], 1)
    product = NativeProduct(batch.spans)
    for x in (torch.randn(3, 17), torch.randn(3, 16).bfloat16()):
        with pytest.raises(ValueError, match="do not fit"):
            product(x, batch.linear.weight, None, 1)
    twice, backwards = batch.spans[0], batch.spans[0]._replace(start=3, stop=2)
    for spans in ([*batch.spans, twice], [backwards], [twice._replace(start=2, stop=4)], [twice._replace(start=-1)]):
        with pytest.raises(ValueError, match="overlap"):
            NativeProduct(spans)(batch.x, batch.linear.weight, None, 1)


def test_spans_are_rows_with_the_same_mask() -> None:
    """In whatever order they come, and how many rows each of them has."""
    masks = [Part("list", 0.01, (0.0,)), Part("bits", 0.5, (0.0,)), Part("list", 0.01, (0.0,))]
    batch = Batch(30, 200, torch.bfloat16, masks, 0)
    one, two, three = (span.parts for span in batch.spans)
    spans = [
        NativeSpan(one, 0.7, 0, 5),
        NativeSpan(two, 1.0, 5, 14),
        NativeSpan(three, 0.7, 20, 21),
        NativeSpan(two, 1.0, 30, 33),
    ]
    x = torch.randn(40, 200).bfloat16()
    together = NativeProduct(spans[::-1])(x, batch.linear.weight, None, 1)
    for row in range(40):
        own = [span._replace(start=0, stop=1) for span in spans if span.start <= row < span.stop]
        assert torch.equal(NativeProduct(own)(x[row : row + 1], batch.linear.weight, None, 1)[0], together[row])


def test_a_mask_that_prunes_nothing_of_a_linear_leaves_it_to_the_base() -> None:
    batch = Batch(20, 64, torch.bfloat16, [Part("bits", 0.5, (0.0,)), Part("list", 0.1, (0.0,))], 1)
    product = NativeProduct(batch.spans)
    assert (product.find("this"), product.find("other"), product.find("head")) == (1, None, None)
    assert torch.equal(
        product(batch.x, batch.linear.weight, None, 0), dense(batch.x, batch.linear.weight, batch.linear.bias)
    )


def test_one_product_serves_several_threads() -> None:
    batch = Batch(64, 300, torch.bfloat16, [Part("list", 0.02, (0.0,) * 5), Part("bits", 0.5, (0.3,))], 3)
    expected = batch.multiply()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: batch.multiply(), range(200)))
    assert all(torch.equal(y, expected) for y in found)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    native.find_library.cache_clear()
    yield
    native.find_library.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_torch_takes_over_and_says_so_once(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="masquerade"):
        base = load(str(tiny_folder), device="cpu")
        manager = MaskManager.attach(base.model)
        resident = [manager.fit(world.make_mask(base, rho, 1)) for rho in (0.003, 0.3)]
    assert [record.getMessage() for record in caplog.records if "native" in record.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    assert not any(isinstance(c, NativeMask) for mask in resident for c in mask.corrections.values())
    ids = torch.arange(6, 46).unsqueeze(0)
    expected = world.materialise(base.model, world.make_mask(base, 0.3, 1), 0.0)(ids).logits
    found = base.model(ids, route=make_route([Span(AppliedMask(resident[1], 0.0), 0, 40)])).logits
    assert torch.allclose(found, expected, atol=1e-3)
    with pytest.raises(UnusableModel, match="compiler"):
        NativeProduct()


def test_a_library_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "LIBRARY", Path(np._core._multiarray_umath.__file__))
    native.find_library.cache_clear()
    assert native.find_library() is None
    native.find_library.cache_clear()
    assert "other sources" in caplog.text


def test_a_copy_of_a_model_computes_with_its_own_weights(tiny: Base, manager: MaskManager) -> None:
    twin, ids = copy.deepcopy(tiny.model), torch.arange(6, 20).unsqueeze(0)
    twin.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert not torch.allclose(twin(ids).logits, tiny.model(ids).logits)


def test_gradients_flow_through_an_attached_model(tiny: Base, manager: MaskManager) -> None:
    """With and without a mask."""
    applied = AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 0.0)
    embedded = tiny.model.get_input_embeddings()(torch.arange(6, 20).unsqueeze(0)).requires_grad_(True)
    found = []
    for spans in ([], [Span(applied, 0, 14)]):
        logits = tiny.model(inputs_embeds=embedded, use_cache=False, route=make_route(spans)).logits
        found.append(torch.autograd.grad(logits.square().mean(), embedded)[0])
    expected = world.materialise(tiny.model, world.make_mask(tiny, 0.3, seed=1), 0.0)
    logits = expected(inputs_embeds=embedded, use_cache=False).logits
    assert torch.allclose(found[1], torch.autograd.grad(logits.square().mean(), embedded)[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_rows_of_a_bf16_model_do_not_depend_on_the_batch(tiny_folder: Path) -> None:
    """The Linears of every row, seen by hooks, over masks of both kinds and rows of the base."""
    base = load(str(tiny_folder), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        name = "model.layers.1.mlp.down_proj"
        assert serves(base.model.get_submodule(name))
        manager = MaskManager.attach(base.model)
        resident = [manager.fit(world.make_mask(base, rho, seed)) for seed, rho in enumerate((0.003, 0.3))]
        linear = base.model.get_submodule(name)
        x = torch.randn(1, 20, linear.in_features).bfloat16()
        spans = [
            Span(AppliedMask(resident[0], 0.0), 0, 9),
            Span(AppliedMask(resident[1], 0.0), 9, 10),
            Span(AppliedMask(resident[0], 0.3), 12, 13),
        ]
        together = make_route(spans).multiply(name, x, linear.weight, None)[0]
        for row in range(20):
            applied = next((span.applied for span in spans if span.start <= row < span.stop), None)
            one = make_route([Span(applied, 0, 1)] if applied else [])
            assert torch.equal(one.multiply(name, x[:, row : row + 1], linear.weight, None)[0, 0], together[row])


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer, over memory of just the right size."""
    flags = "-std=c++17 -fopenmp -ffp-contract=off -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all"
    units: dict[Path, list[str]] = {Path(__file__).with_name("sanitize.cpp"): [], CPP / "dispatch.cpp": []}
    units |= {CPP / f"{name}.cpp": [] for name in ("layers", "list", "portable", "quantised", "rows")}
    if platform.machine() == "x86_64":
        units[CPP / "avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]

    def compile_unit(unit: Path) -> None:
        command = ["g++", *flags.split(), *units[unit], f"-I{CPP}", "-c", str(unit), "-o", tmp_path / f"{unit.stem}.o"]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, units))
    program = tmp_path / "sanitize"
    subprocess.run(["g++", *flags.split(), *sorted(tmp_path.glob("*.o")), "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stdout + done.stderr


STARVED = """
import resource, sys
from pathlib import Path
import torch
from masquerade.kernels import NativeProduct
isa, threads, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
torch.set_num_threads(threads)
weight, x = torch.ones(64, 64, dtype=dtype), torch.ones(400_000, 64, dtype=dtype)
product, free = NativeProduct(isa=isa), resource.getrlimit(resource.RLIMIT_AS)
expected = product(x[:8], weight, None)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2 * x.nbytes, free[1]))  # enough for the outputs, and not for the inputs
try:
    product(x, weight, None)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, free)
assert torch.equal(product(x[:8], weight, None), expected)
assert torch.equal(product(x, weight, None)[-8:], expected)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "amx"])
def test_a_product_without_memory_is_an_error_and_the_process_goes_on(isa: str, threads: int) -> None:
    """Inputs and sums of all rows take more than those of the call; with AMX only those of a band of rows do."""
    dtype = "float32" if isa in ("portable", "avx2", "avx512") else "bfloat16"
    run = [sys.executable, "-c", STARVED, isa, str(threads), dtype]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the native kernels have no memory for this step\n"
