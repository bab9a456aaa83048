"""The masked product on CUDA, in Triton.

`pytest -m gpu` checks the kernels against float64 on a device, the ordinary tests in Triton's interpreter; these also
compile them for sm_90. The same holds for `masquerade.model.cuda`, which prepares a batch for these kernels.
"""

from masquerade.kernels.cuda.masks import CudaBits, CudaList, find_kernels, serves
from masquerade.kernels.cuda.tiles import FIELDS, Tiles, tile

__all__ = ["FIELDS", "CudaBits", "CudaList", "Tiles", "find_kernels", "serves", "tile"]
