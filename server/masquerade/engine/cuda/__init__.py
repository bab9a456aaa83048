"""Engine steps on a CUDA device: paged attention for decodes, packed prompts, CUDA graphs.

Its tests pass on an H200, where it was measured once. Elsewhere they run the kernel in Triton's interpreter, and
everything but flash attention and graph capture on a CPU.
"""
