"""Attention of decode steps against torch's in float64: on a CUDA device if there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from masquerade.engine.prefix import BLOCK_SIZE

pytest.importorskip("triton")
from masquerade.engine.cuda import paged

pytestmark = pytest.mark.gpu

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "lengths"),
    [
        (4, 2, 16, [1, 17, 75]),
        (3, 1, 20, [130]),  # neither is a power of two
        (2, 2, 64, [64, 65]),
    ],
    ids=str,
)
def test_paged_decode_equals_torch(
    heads: int, kv_heads: int, size: int, lengths: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(size)
    rows, most = len(lengths), -(-max(lengths) // BLOCK_SIZE)
    blocks = 1 + rows * most
    keys, values = (torch.randn(blocks * kv_heads, BLOCK_SIZE, size, device=DEVICE).to(dtype) for _ in range(2))
    table = (torch.randperm(blocks - 1)[: rows * most].view(rows, most) + 1).to(DEVICE, torch.int32)
    q = torch.randn(heads, rows, size, device=DEVICE).to(dtype).transpose(0, 1)
    scale = 0.3
    found = paged.decode(
        q, keys, values, kv_heads, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), scale
    )
    for row, length in enumerate(lengths):
        past = [
            part.view(blocks, kv_heads, BLOCK_SIZE, size)[table[row].long()].transpose(0, 1).flatten(1, 2)[:, :length]
            for part in (keys.double(), values.double())
        ]  # [kv heads, length, size]
        expected = F.scaled_dot_product_attention(
            q[row].double().unsqueeze(1), *(part.repeat_interleave(heads // kv_heads, 0) for part in past), scale=scale
        )
        assert torch.allclose(found[row].double(), expected.squeeze(1), atol=TOLERANCE[dtype], rtol=0)


def test_what_lies_beyond_a_row_is_not_read() -> None:
    """Blocks of others and places not yet written may hold anything."""
    keys, values = (torch.full((6, BLOCK_SIZE, 16), float("nan"), device=DEVICE) for _ in range(2))
    keys[2:4, :3], values[2:4, :3] = 1.0, 2.0
    table = torch.tensor([[1, 2]], dtype=torch.int32, device=DEVICE)
    q = torch.ones(1, 4, 16, device=DEVICE)
    found = paged.decode(q, keys, values, 2, table, torch.tensor([3], dtype=torch.int32, device=DEVICE), 1.0)
    assert torch.equal(found, torch.full_like(found, 2.0))
