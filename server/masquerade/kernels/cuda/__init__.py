"""The masked product on CUDA, in Triton.

Its tests pass on an H200, where it was measured once (benchmarks/RESULTS.md, "CUDA devices"); elsewhere they check
the kernels against float64 in Triton's interpreter and compile them for sm_90. The same holds for
`masquerade.model.cuda`, which prepares a batch for these kernels.
"""

from masquerade.kernels.cuda.masks import CudaBits, CudaList, find_kernels, serves
from masquerade.kernels.cuda.tiles import FIELDS, Tiles, tile

__all__ = ["FIELDS", "CudaBits", "CudaList", "Tiles", "find_kernels", "serves", "tile"]
