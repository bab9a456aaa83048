"""Engine steps on a CUDA device: paged attention for decodes, packed prompts, CUDA graphs.

No module of this package has run on a device yet. The tests run the kernel in Triton's interpreter, and everything but
flash attention and graph capture on a CPU.
"""
