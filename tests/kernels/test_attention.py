"""The native attention against float64: chunks of many requests, of which no row depends on another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from masquerade.errors import UnusableModel
from masquerade.kernels import PagedChunks, PagedStep, attend_chunks, attends, native

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
ISAS = library.isas if (library := native.find_library()) else []
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
BLOCK = 16


class Paged:
    """A cache with the context of every chunk in blocks of no order, and the queries of the chunks' rows."""

    def __init__(
        self, chunks: list[tuple[int, int]], kv_heads: int, shared: int, size: int, dtype: torch.dtype, seed: int
    ) -> None:
        """`chunks` are the rows of each and the positions before them; `shared` query heads have one head's keys."""
        torch.manual_seed(seed)
        self.kv_heads, self.shared = kv_heads, shared
        self.rows = np.array([rows for rows, _ in chunks], np.int32)
        self.lengths = np.array([rows + before for rows, before in chunks], np.int32)
        counts = -(-self.lengths // BLOCK)
        order = torch.randperm(int(counts.sum()) + 2).int().numpy()
        self.blocks = np.full((len(chunks), counts.max()), order[-1])
        for chunk, own in enumerate(np.split(order[:-2], np.cumsum(counts)[:-1])):
            self.blocks[chunk, : len(own)] = own
        self.keys = torch.randn(len(order) * kv_heads, BLOCK, size).to(dtype)
        self.values = torch.randn(len(order) * kv_heads, BLOCK, size).to(dtype)
        self.q = torch.randn(int(self.rows.sum()), kv_heads * shared, size).to(dtype)

    def attend(self, rows: np.ndarray | None = None, isa: str | None = None) -> Tensor:
        """All rows in their chunks, or one by one those that are given."""
        starts = np.cumsum(self.rows, dtype=np.int32) - self.rows
        if rows is None:
            q, chunks = self.q, PagedChunks(self.blocks, self.rows, self.lengths)
        else:
            chunk = np.searchsorted(starts, rows, "right") - 1
            lengths = self.lengths[chunk] - self.rows[chunk] + 1 + rows - starts[chunk]
            q, chunks = self.q[torch.from_numpy(rows)], PagedChunks(self.blocks[chunk], np.ones_like(rows), lengths)
        return attend_chunks(q, self.keys, self.values, self.kv_heads, chunks, 0.3, isa)

    def expect(self) -> Tensor:
        """The same in float64, chunk by chunk."""
        size, found, row = self.q.shape[2], [], 0
        for blocks, rows, length in zip(self.blocks, self.rows, self.lengths, strict=True):
            k, v = (
                part.view(-1, self.kv_heads, BLOCK, size)[blocks].transpose(0, 1).reshape(self.kv_heads, -1, size)
                for part in (self.keys.double(), self.values.double())
            )
            k, v = (part[:, :length].repeat_interleave(self.shared, 0) for part in (k, v))
            scores = self.q[row : row + rows].double().transpose(0, 1) @ k.transpose(1, 2) * 0.3
            hidden = torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)
            found.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
            row += rows
        return torch.cat(found)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 5, 17, 70]), st.integers(0, 200)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from([16, 48, 64, 80, 128]),
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 2**32 - 1),
)
def test_attention_equals_the_formula_and_no_row_depends_on_another(
    chunks: list[tuple[int, int]], kv_heads: int, shared: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    paged = Paged(chunks, kv_heads, shared, size, dtype, seed)
    expected = paged.expect()
    some = np.arange(0, len(expected), 1 + len(expected) // 12)
    for isa in ISAS:
        found = paged.attend(isa=isa)
        assert ((found.double() - expected).abs() <= TOLERANCE[dtype] * (1 + expected.abs())).all()
        assert torch.equal(paged.attend(some, isa), found[torch.from_numpy(some)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    paged, threads = Paged([(1, 700), (40, 300), (1, 3)], 3, 3, 64, dtype, 0), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(paged.attend())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(rows, found[0]) for rows in found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_lies_beyond_a_context_never_counts(dtype: torch.dtype, isa: str) -> None:
    """Blocks that were another request's, and the rest of the last one."""
    paged = Paged([(1, 20), (3, 40)], 2, 3, 64, dtype, 0)
    clean = paged.attend(isa=isa)
    used = torch.zeros(len(paged.keys) // 2, BLOCK, dtype=torch.bool)
    for blocks, length in zip(paged.blocks, paged.lengths, strict=True):
        for position in range(length):
            used[blocks[position // BLOCK], position % BLOCK] = True
    unused = ~used.repeat_interleave(2, 0)
    paged.keys[unused] = paged.values[unused] = float("nan")
    assert torch.equal(paged.attend(isa=isa), clean)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [16, 48, 64, 80])
def test_what_earlier_calls_left_never_counts(
    dtype: torch.dtype, isa: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even times zero: here it is NaN."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # memory is a thread's own
    earlier, paged = Paged([(70, 200)], 3, 8, 128, dtype, 0), Paged([(5, 151), (70, 8), (1, 20)], 3, 3, size, dtype, 1)
    for part in (earlier.q, earlier.keys, earlier.values):
        part.fill_(float("nan"))
    assert earlier.attend(isa=isa).isnan().all()
    expected = paged.expect()
    assert ((paged.attend(isa=isa).double() - expected).abs() <= TOLERANCE[dtype] * (1 + expected.abs())).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_scores_do_not_overflow_and_a_nan_stays(dtype: torch.dtype, isa: str) -> None:
    paged = Paged([(1, 200), (1, 100)], 1, 2, 64, dtype, 0)
    paged.q *= 100
    expected = paged.expect()
    assert torch.allclose(paged.attend(isa=isa).double(), expected, atol=2e-2 if dtype is torch.bfloat16 else 1e-3)
    paged.keys[paged.blocks[0, 3], 5, 7] = float("nan")
    found = paged.attend(isa=isa)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_what_the_kernel_supports() -> None:
    assert attends(torch.zeros(4, 16, 64))
    assert attends(torch.zeros(4, 16, 64).bfloat16())
    assert not attends(torch.zeros(4, 16, 64).half())
    assert not attends(torch.zeros(4, 16, 40))
    paged = Paged([(1, 5)], 1, 1, 64, torch.float32, 0)
    whole = paged.q
    paged.q = whole.repeat(2, 1, 1)
    with pytest.raises(ValueError, match="do not fit 1 rows"):
        paged.attend()
    paged.q = whole.bfloat16()
    with pytest.raises(ValueError, match="do not fit"):
        paged.attend()


def test_without_the_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masquerade.kernels.native.find_library", lambda: None)
    with pytest.raises(UnusableModel, match="compiler"):
        Paged([(1, 5)], 1, 1, 64, torch.float32, 0).attend()


@pytest.mark.parametrize("positions", [6, 48, 112, 128])
def test_blocks_that_the_kernel_would_read_wrongly_are_refused(positions: int) -> None:
    chunks = PagedChunks(np.zeros((1, 1)), np.array([1]), np.array([4]))
    cache = torch.zeros(2, positions, 64)
    with pytest.raises(ValueError, match=f"blocks of {positions} positions"):
        attend_chunks(torch.zeros(1, 2, 64), cache, cache, 2, chunks, 0.3)
    with pytest.raises(ValueError, match=f"blocks of {positions} positions"):
        PagedStep(chunks, torch.zeros(2, dtype=torch.int64), cache[None], cache[None])
